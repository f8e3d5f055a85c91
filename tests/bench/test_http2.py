"""The load generator asks real servers, takes frames in any pieces, and takes no failure for an answer."""

import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from vivace.bench import frontend, http2
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

NORTHSTAR = Path(__file__).parents[2] / "examples" / "northstar"
LOAD = frontend.Load(rounds=1, streams=2, messages=5, calls=2)
WRONG = frontend.Load(rounds=1, streams=2, messages=-1, calls=2)


def answers(server, method, kind, max_tokens):
    """What a call is answered with."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=max_tokens)
    request = pb.GenerateRequest(text="a", sampling=sampling).SerializeToString()
    [body] = server.connection.call(f"{frontend.SERVICE}/{method}", [request])
    found = [kind.FromString(message) for message in http2.messages(body)]
    for message in found:
        assert len(message.request_id) == 32
        message.ClearField("request_id")
    return found


def test_the_echo_says_what_the_service_says():
    with (
        frontend.server("service", NORTHSTAR) as service,
        frontend.server("echo", NORTHSTAR) as echo,
    ):
        streams = [answers(one, "Generate", pb.GenerateResponse, 20) for one in (service, echo)]
        wholes = [
            answers(one, "GenerateUnary", pb.GenerateUnaryResponse, 1) for one in (service, echo)
        ]
    assert streams[0][:-1] == streams[1][:-1]
    assert [len(one.token_ids) for one in streams[0]] == [1] * 20
    assert "".join(one.text for one in streams[0]).startswith("The parcel leaves the harbour")
    assert len(streams[1]) == 20 and streams[1][-1].HasField("finish")
    sizes = [[one.ByteSize() for one in whole] for whole in wholes]
    assert len(sizes[0]) == len(sizes[1]) == 1 and abs(sizes[0][0] - sizes[1][0]) < 20


def test_a_call_that_fails_is_no_answer():
    with frontend.server("service", NORTHSTAR) as server:
        with pytest.raises(RuntimeError, match="was answered with 0 messages"):
            server.streams(WRONG)  # INVALID_ARGUMENT: so many tokens
        with pytest.raises(RuntimeError, match="was answered with 0 messages"):
            server.median_ms("Embed", LOAD)  # INVALID_ARGUMENT: no inputs
        assert server.streams(LOAD).rate > 0
        assert server.median_ms("GenerateUnary", LOAD) > 0


def frame(kind, flags, stream, body=b""):
    return http2.FRAME.pack(len(body) >> 8, len(body) & 255, kind, flags, stream) + body


@contextmanager
def peer(*pieces):
    """A server that says so, piece by piece, whatever it is told; and what it was told."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connected, _ = listener.accept()
            with connected:
                heard.append(connected.recv(1 << 16))
                for piece in pieces:
                    connected.sendall(piece)
                    time.sleep(0.01)  # for each to be read alone
                connected.shutdown(socket.SHUT_WR)
                while data := connected.recv(1 << 16):
                    heard.append(data)

        thread = threading.Thread(target=serve)
        thread.start()
        connection = http2.Connection(*listener.getsockname(), timeout_s=10)
        try:
            yield connection, heard
        finally:
            connection.close()
            thread.join()


def test_frames_may_come_in_any_pieces():
    message = http2.MESSAGE.pack(0, 300) + b"m" * 300
    said = frame(http2.SETTINGS, 0, 0) + frame(http2.HEADERS, http2.END_HEADERS, 1, b"h")
    said += frame(http2.DATA, 0, 1, message[:100]) + frame(http2.DATA, 0, 3, message)
    said += frame(http2.PING, 0, 0, b"12345678") + frame(http2.DATA, 0, 1, message[100:])
    said += frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 3, b"t")
    said += frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, b"t")
    for size in (7, len(said)):
        pieces = [said[i : i + size] for i in range(0, len(said), size)]
        with peer(*pieces) as (connection, heard):
            bodies = connection.call("/a/B", [b"request", b"request"])
            assert [http2.messages(body) for body in bodies] == [[b"m" * 300]] * 2
        answers = b"".join(heard)
        assert answers.count(frame(http2.SETTINGS, http2.ACK, 0)) == 1
        assert answers.count(frame(http2.PING, http2.ACK, 0, b"12345678")) == 1


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (frame(http2.GOAWAY, 0, 0, bytes(8) + b"too many"), "GOAWAY: b'too many'"),
        (frame(http2.DATA, 0, 1, b"half"), "hung up"),
    ],
)
def test_a_connection_that_ends_early_is_an_error(said, why):
    with peer(said) as (connection, _), pytest.raises(ConnectionError, match=why):
        connection.call("/a/B", [b""])


def test_a_stream_that_is_reset_has_what_came_before():
    said = frame(http2.DATA, 0, 1, b"half") + frame(http2.RESET, 0, 1, bytes(4))
    with peer(said) as (connection, _):
        assert connection.call("/a/B", [b""]) == [b"half"]
