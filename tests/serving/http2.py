"""A client that speaks HTTP/2 itself: it does what no gRPC library lets a client do."""

import socket
import struct
import time
from functools import partial

import h2.config
import h2.connection
import h2.events
import h2.settings


class Connection:
    """One connection. `reads` False: it takes what comes, and never gives the server more room. `window`: the bytes that
    each stream has room for at first, if not as HTTP/2 has it."""

    def __init__(self, target, *, reads=True, window=None):
        host, port = target.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), timeout=20)
        config = h2.config.H2Configuration(
            header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self._h2 = h2.connection.H2Connection(config)
        # Huffman coding in Python takes minutes for a megabyte.
        self._h2.encoder.encode = partial(self._h2.encoder.encode, huffman=False)
        self._h2.initiate_connection()
        self._reads = reads
        self._target = target
        self.events = []
        self.flush()
        if window is not None:
            self._h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
            self.flush()
            while not any(getattr(one, "changed_settings", None) for one in self._acknowledged()):
                self.receive()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._socket.close()

    def _acknowledged(self):
        return [one for one in self.events if isinstance(one, h2.events.SettingsAcknowledged)]

    def flush(self):
        self._socket.sendall(self._h2.data_to_send())

    def call(self, method, message, *, headers=(), service="vivace.v1.Inference"):
        """Begin a call; returns its stream."""
        stream = self._h2.get_next_available_stream_id()
        fixed = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", f"/{service}/{method}".encode()),
            (b":authority", self._target.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        ]
        self._h2.send_headers(stream, [*fixed, *headers])
        data = struct.pack(">BI", 0, len(message)) + message
        while data:
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
            if not room:
                self.flush()
                self.receive()
                continue
            piece, data = data[:room], data[room:]
            self._h2.send_data(stream, piece, end_stream=not data)
        self.flush()
        return stream

    def settimeout(self, seconds):
        self._socket.settimeout(seconds)

    def goaways(self):
        return [one for one in self.events if isinstance(one, h2.events.ConnectionTerminated)]

    def begun(self):
        """The streams whose headers have come."""
        headers = h2.events.ResponseReceived
        return {one.stream_id for one in self.events if isinstance(one, headers)}

    def open_window(self, stream):
        """Begin to read, after all."""
        self._reads = True
        self._h2.increment_flow_control_window(1 << 20)
        self._h2.increment_flow_control_window(1 << 20, stream)
        self.flush()
        self.settimeout(20)

    def ping(self):
        self._h2.ping(b"vivace!!")
        self.flush()

    def receive(self):
        """What has come; waits for something. Empty when the server has hung up."""
        data = self._socket.recv(65_536)
        found = self._h2.receive_data(data) if data else []
        for event in found:
            if isinstance(event, h2.events.DataReceived) and self._reads:
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        self.flush()
        self.events += found
        return found if data else None

    def status(self, stream, seconds=20):
        """The gRPC status and message that a stream ends with; the HTTP/2 event where it has none."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for event in self.events:
                if getattr(event, "stream_id", None) != stream:
                    continue
                headers = dict(getattr(event, "headers", None) or ())
                if b"grpc-status" in headers:
                    return int(headers[b"grpc-status"]), headers.get(b"grpc-message", b"").decode()
                if isinstance(event, h2.events.StreamReset):
                    return "reset", event.error_code
            if self.receive() is None:
                return "closed", None
        raise AssertionError("no status")
