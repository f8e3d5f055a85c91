"""A load generator: gRPC calls over one connection, spoken as HTTP/2 on a plain socket.

A client made of grpcio costs as much for a message as the server that is measured, and would bound it. This one keeps the
bytes that come and looks into them afterwards. It knows what a gRPC server on loopback needs and no more: no TLS, no
compression, no flow control (its windows are as large as they can be), no status; who counts the messages sees a call that
failed.
"""

import socket
import struct
import time
from collections.abc import Sequence

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW = 2**31 - 1  # bytes that the server may send on a connection and on a stream, ever
DEFAULT_WINDOW = 65_535
INITIAL_WINDOW_SIZE = 4  # RFC 9113, 6.5.2
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
FRAME = struct.Struct(">HBBBI")  # length (16 bits and 8), type, flags, stream
MESSAGE = struct.Struct(">BI")  # gRPC: compressed or not, length
READ_BYTES = 1 << 18

Pieces = list[tuple[float, bytes]]  # when each came, of `time.perf_counter()`


class Connection:
    """One connection to `host:port`; for one thread."""

    def __init__(self, host: str, port: int, *, timeout_s: float) -> None:
        self._host = host
        self._socket = socket.create_connection((host, port), timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._next_stream = 1
        self._rest = b""  # of a frame that has not come whole
        settings = struct.pack(">HI", INITIAL_WINDOW_SIZE, WINDOW)
        more = struct.pack(">I", WINDOW - DEFAULT_WINDOW)
        self._socket.sendall(
            PREFACE + _frame(SETTINGS, 0, 0, settings) + _frame(WINDOW_UPDATE, 0, 0, more)
        )

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def call(self, path: str, requests: Sequence[bytes]) -> list[bytes]:
        """Make calls of one method at the same time; returns the body of each, once all have ended."""
        return [b"".join(data for _, data in pieces) for pieces in self.pieces(path, requests)]

    def pieces(self, path: str, requests: Sequence[bytes]) -> list[Pieces]:
        """The same, each body as it came."""
        first = self._next_stream
        streams = range(first, first + 2 * len(requests), 2)
        self._next_stream = streams.stop
        headers = self._headers(path)
        self._socket.sendall(
            b"".join(
                _frame(HEADERS, END_HEADERS, stream, headers)
                + _frame(DATA, END_STREAM, stream, MESSAGE.pack(0, len(request)) + request)
                for stream, request in zip(streams, requests, strict=True)
            )
        )
        pieces: dict[int, Pieces] = {stream: [] for stream in streams}
        num_open = len(requests)
        while num_open:
            num_open -= self._receive(pieces)
        return [pieces[stream] for stream in streams]

    def _receive(self, pieces: dict[int, Pieces]) -> int:
        """Take what has come; waits for something. Returns how many streams have ended."""
        data = self._socket.recv(READ_BYTES)
        when = time.perf_counter()
        if not data:
            raise ConnectionError("the server has hung up")
        data = self._rest + data
        at, end, num_ended = 0, len(data) - FRAME.size, 0
        while at <= end:
            high, low, kind, flags, stream = FRAME.unpack_from(data, at)
            start = at + FRAME.size
            stop = start + (high << 8 | low)
            if stop > len(data):
                break
            at = stop
            if kind == DATA:
                pieces[stream].append((when, data[start:stop]))
            elif kind not in (HEADERS, RESET):
                self._answer(kind, flags, data[start:stop])
                continue
            num_ended += kind == RESET or flags & END_STREAM
        self._rest = data[at:]
        return num_ended

    def _answer(self, kind: int, flags: int, body: bytes) -> None:
        if kind == GOAWAY:
            raise ConnectionError(f"the server has sent GOAWAY: {body[8:]!r}")
        if kind in (SETTINGS, PING) and not flags & ACK:
            self._socket.sendall(_frame(kind, ACK, 0, body if kind == PING else b""))

    def _headers(self, path: str) -> bytes:
        """HPACK without its tables: names and values as they are."""
        fields = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path.encode()),
            (b":authority", self._host.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        )
        return b"".join(
            b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value
            for name, value in fields
        )


def messages(body: bytes) -> list[bytes]:
    """The messages of a call's body."""
    return [message for _, message in timed_messages([(0.0, body)])]


def timed_messages(pieces: Pieces) -> Pieces:
    """The messages of a call's body, and when the last byte of each came."""
    found: Pieces = []
    rest = b""
    for when, data in pieces:
        rest += data
        at = 0
        while len(rest) - at >= MESSAGE.size:
            _compressed, length = MESSAGE.unpack_from(rest, at)
            start = at + MESSAGE.size
            if start + length > len(rest):
                break
            at = start + length
            found.append((when, rest[start:at]))
        rest = rest[at:]
    return found


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return FRAME.pack(len(body) >> 8, len(body) & 255, kind, flags, stream) + body
