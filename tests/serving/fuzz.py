"""Random requests to every RPC through the real port: `python tests/serving/fuzz.py --seconds 60`.

Half are good requests with a few fields changed to something that somebody might send, half of those with some bytes
changed as well. Whatever comes in, the answer is a result or a status that says what was wrong, and memory stays flat.
"""

import argparse
import random
import struct
import sys
import time
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.serving.server_process import PROMPT, serving
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

INTEGERS = (
    0,
    1,
    2,
    3,
    7,
    20,
    21,
    64,
    65,
    1000,
    4095,
    4096,
    2**31 - 1,
    2**31,
    2**63 - 1,
    -1,
    -(2**63),
)
REALS = (
    0.0,
    0.5,
    1.0,
    2.0,
    -1.0,
    -0.0,
    1e308,
    5e-324,
    1e-30,
    2.0001,
    99.0,
    float("nan"),
    float("inf"),
)
TEXTS = (
    "", "x", "northstar", PROMPT, "system", "user", "assistant", "tool", "<|im_start|>system\n<|im_end|>", "{{ 7 * 7 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for i in range(10**9) %}{% endfor %}", "\x00\x1b[31m\r\n", "\ufeff😀",
    "שלום مرحبا 你好", "a" * 300, "é" * 5000, "true", "[1, 2", '{"a": {"b": [null]}}', "../../etc/passwd", "\ud7ff\ue000",
)  # fmt: skip
GOOD = {  # RPC -> a request that works, short
    "Generate": pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(max_tokens=3)),
    "GenerateUnary": pb.GenerateRequest(text="Hello", sampling=pb.SamplingParams(max_tokens=3)),
    "Chat": pb.ChatRequest(
        messages=[pb.ChatMessage(role="user", content="Hello")],
        sampling=pb.SamplingParams(max_tokens=3),
    ),
    "ChatUnary": pb.ChatRequest(
        messages=[
            pb.ChatMessage(role="system", content="Be brief."),
            pb.ChatMessage(role="user", content="Hello"),
        ],
        sampling=pb.SamplingParams(max_tokens=3),
    ),
    "Batch": pb.BatchRequest(
        items=[
            pb.BatchItem(generate=pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=2))),
            pb.BatchItem(chat=pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="b")])),
        ]
    ),
    "Embed": pb.EmbedRequest(inputs=[pb.Prompt(text="Hello"), pb.Prompt(text="Good morning")]),
    "Score": pb.ScoreRequest(
        prompt=pb.Prompt(text="Hello"), continuations=[pb.Prompt(text=" world"), pb.Prompt(text="!")]
    ),
    "Tokenize": pb.TokenizeRequest(text="Hello", return_tokens=True),
    "Detokenize": pb.DetokenizeRequest(token_ids=[5, 6, 7]),
    "Abort": pb.AbortRequest(request_id="nobody"),
    "GetModelInfo": pb.GetModelInfoRequest(),
    "GetServerInfo": pb.GetServerInfoRequest(),
    "GetLoads": pb.GetLoadsRequest(),
    "WatchLoads": pb.WatchLoadsRequest(interval_ms=10),
}  # fmt: skip
DEADLINE_S = 1.0
MAX_GROWTH_MIB = 16  # what the allocators of two processes keep
WATCHED = 3  # loads that are read
FORBIDDEN = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
LEAKS = (
    "Traceback",
    ".py",
    "/home",
    "/work",
    "/tmp",
    "/usr",
    "site-packages",
    "<class",
    "object at 0x",
)


class Fuzzer:
    """Requests to one RPC, one after another."""

    def __init__(self, target, rpc, seed):
        self._random = random.Random(f"{rpc}{seed}")
        self._rpc = rpc
        self._channel = grpc.insecure_channel(target)
        method = pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name[rpc]
        self._streams = method.server_streaming
        make = self._channel.unary_stream if self._streams else self._channel.unary_unary
        self._call = make(f"/vivace.v1.Inference/{rpc}", request_serializer=bytes)

    def run(self, seconds):
        """How many requests ended in which status. Raises AssertionError at the first that may not."""
        counts = {}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            data = self.request()
            code, details = self.send(data)
            assert code not in FORBIDDEN, (self._rpc, code, details, data)
            told = [leak for leak in LEAKS if leak in details and leak.encode() not in data]
            assert not told, (self._rpc, told, details, data)
            counts[code] = counts.get(code, 0) + 1
        return counts

    def close(self):
        self._channel.close()

    def send(self, data):
        try:
            call = self._call(data, timeout=DEADLINE_S)
            if self._streams:
                for number, _ in enumerate(call):
                    if self._rpc == "WatchLoads" and number == WATCHED:
                        call.cancel()
                        break
        except grpc.RpcError as error:
            return error.code(), error.details() or ""
        return grpc.StatusCode.OK, ""

    def request(self):
        message = type(GOOD[self._rpc])()
        message.CopyFrom(GOOD[self._rpc])
        for _ in range(self._random.randrange(4)):
            self.change(message)
        data = message.SerializeToString()
        return self.spoiled(data) if self._random.random() < 0.3 else data

    def spoiled(self, data):
        data = bytearray(data)
        for _ in range(self._random.randrange(1, 4)):
            place = self._random.randrange(len(data) + 1)
            data[place : place + self._random.randrange(2)] = self._random.randbytes(
                self._random.randrange(3)
            )
        return bytes(data)

    def change(self, message, depth=0):
        """Set a random field, of the message or of one inside it, to something."""
        fields = message.DESCRIPTOR.fields
        if not fields:
            return
        field = self._random.choice(fields)
        if field.message_type is None:
            self.set_scalar(message, field)
        elif field.message_type.GetOptions().map_entry:
            self.put_entry(message, field)
        else:
            self.change_inside(message, field, depth)

    def set_scalar(self, message, field):
        if field.is_repeated:
            count = self._random.choice((1, 2, 3, 20, 300))
            getattr(message, field.name).extend(self.scalar(field) for _ in range(count))
        elif self._random.random() < 0.1:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, self.scalar(field))

    def put_entry(self, message, field):
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        getattr(message, field.name)[self.scalar(key)] = self.scalar(value)

    def change_inside(self, message, field, depth):
        inside = getattr(message, field.name)
        if field.is_repeated:
            if not inside or self._random.random() < 0.3:
                inside.add()
            inside = self._random.choice(inside)
        else:
            inside.SetInParent()
        if depth < 4:
            self.change(inside, depth + 1)

    def scalar(self, field):
        if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            return self._random.choice(TEXTS)
        if field.type == field.TYPE_BOOL:
            return self._random.random() < 0.5
        if field.type == field.TYPE_ENUM:
            return self._random.choice((0, 1, 2, 3, 99))
        if field.type in (field.TYPE_DOUBLE, field.TYPE_FLOAT):
            value = self._random.choice(REALS)
            return value if field.type == field.TYPE_DOUBLE else fp32(value)
        bits = 32 if field.type in (field.TYPE_INT32, field.TYPE_UINT32) else 64
        low = 0 if field.type in (field.TYPE_UINT32, field.TYPE_UINT64) else -(2 ** (bits - 1))
        high = 2**bits - 1 if low == 0 else 2 ** (bits - 1) - 1
        value = self._random.choice(INTEGERS)
        return min(max(value, low), high)


def fp32(value):
    return struct.unpack("f", struct.pack("f", value))[0] if abs(value) < 1e38 else value


def resident_mib(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def warmed_up(fuzzer, pids, seconds):
    """What is resident once everything has been touched, the whole cache before all: nothing grows any more, or it is late."""
    before = [resident_mib(pid) for pid in pids]
    for _ in range(12):
        fuzzer.run(seconds)
        now = [resident_mib(pid) for pid in pids]
        if max(b - a for a, b in zip(before, now, strict=True)) < 1:
            break
        before = now
    return now


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of each RPC")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    print(f"seed {args.seed}")
    # A cache so small that all its pages are touched before memory is measured.
    with serving("--kv-memory", "24MiB") as server:
        pids = (server.process.pid, server.engine_pid())
        for rpc in GOOD:
            fuzzer = Fuzzer(server.target, rpc, args.seed)
            before = warmed_up(fuzzer, pids, min(5, args.seconds))
            counts = fuzzer.run(args.seconds)
            growth = [resident_mib(pid) - mib for pid, mib in zip(pids, before, strict=True)]
            fuzzer.close()
            assert max(growth) < MAX_GROWTH_MIB, f"{rpc}: memory grew by {max(growth):.1f} MiB"
            ends = ", ".join(f"{code.name} {count}" for code, count in counts.items())
            print(
                f"{rpc:16s} server {growth[0]:+.1f} MiB, engine {growth[1]:+.1f} MiB; {ends}",
                flush=True,
            )


if __name__ == "__main__":
    main()
