"""What `vivace bench frontend` measures, each in a server process of its own: `service` is our whole front-end over an
engine that answers at once; `echo` is the least that gRPC can do, the same messages from a bare servicer.

Both run grpc.aio on uvloop, and print their port, then their CPU time for each line of stdin; they end when it does. No
model runs.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import cycle, islice
from pathlib import Path

import grpc
import uvloop

from vivace.engine.chat import ChatEncoder
from vivace.engine.completion import TextEvent, stream
from vivace.engine.config import ServerConfig
from vivace.engine.events import (
    EngineInfo,
    EngineRequest,
    FinishReason,
    Loads,
    Sampling,
    TokenEvent,
    Usage,
)
from vivace.engine.models.generation_config import read_generation_defaults
from vivace.engine.sampling import TextRules
from vivace.engine.tokenizer import Tokenizer
from vivace.serving import convert
from vivace.serving.models import Models, ServedModel
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc
from vivace.serving.request_log import RequestLog
from vivace.serving.running import RunningRequests
from vivace.serving.server import grpc_server
from vivace.serving.servicer import InferenceServicer

HOST = "127.0.0.1"
REPLY = "The parcel leaves the harbour in the morning, and takes three days to the north coast. "
REQUEST_ID = "0" * 32  # as long as the names that the service makes
MAX_CONTEXT_TOKENS = 1 << 20


class InstantEngine:
    """See `vivace.engine.runtimes.Engine`: every token is there before it is asked for, each an event of its own."""

    def __init__(self, reply: tuple[int, ...], info: EngineInfo) -> None:
        self._reply = reply
        self._info = info

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenEvent]:
        """As many tokens as were asked for."""
        most = request.sampling.max_tokens
        for i in range(most - 1):
            yield TokenEvent(request.request_id, (self._reply[i % len(self._reply)],))
        yield TokenEvent(
            request.request_id,
            (self._reply[(most - 1) % len(self._reply)],),
            finish=FinishReason.LENGTH,
            usage=Usage(len(request.prompt_token_ids), 0, most, 0.0, 0.0, 0.0, 0),
        )

    async def abort(self, request_id: str) -> bool:
        """Nothing to end: its events are there already."""
        return False

    async def info(self) -> EngineInfo:
        """What it pretends to be."""
        return self._info

    async def loads(self) -> Loads:
        """Idle."""
        return Loads()

    async def died(self) -> str:
        """Never returns."""
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    async def close(self) -> None:
        """Nothing to give back."""


class Echo(pb_grpc.InferenceServicer):
    """Answers with the service's messages, made beforehand, and does nothing else."""

    def __init__(
        self, messages: Sequence[pb.GenerateResponse], whole: pb.GenerateUnaryResponse
    ) -> None:
        *self._messages, self._last = messages
        self._whole = whole

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """One message a token."""
        for message in islice(cycle(self._messages), request.sampling.max_tokens - 1):
            await context.write(message)
        await context.write(self._last)

    async def GenerateUnary(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateUnaryResponse:
        """One token."""
        return self._whole


async def _serve(kind: str, model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    reply = tuple(tokenizer.encode(REPLY, add_special_tokens=False))
    info = EngineInfo(
        "Instant", 1 << 20, MAX_CONTEXT_TOKENS, (), 0, "fp32", "", "none", 0, 16, 1, "fp32", 0, 64, 64, 0.0
    )  # fmt: skip
    engine = InstantEngine(reply, info)
    with Path(os.devnull).open("w") as log:  # written and flushed, and kept nowhere
        if kind == "echo":
            server = grpc.aio.server()
            events = await _events(engine, tokenizer, len(reply) + 1)
            messages = [await convert.response(event) for event in events]
            whole = await convert.unary_response(REQUEST_ID, events[-1:])
            servicer: pb_grpc.InferenceServicer = Echo(messages, whole)
        else:
            server = grpc_server(ServerConfig())
            defaults = read_generation_defaults(model)
            served = ServedModel(
                model.name, engine, info, tokenizer, ChatEncoder(tokenizer), defaults
            )
            running = RunningRequests(RequestLog(log), max_requests=1024)
            servicer = InferenceServicer(Models((model.name,), {model.name: served}), running)
        pb_grpc.add_InferenceServicer_to_server(servicer, server)
        port = server.add_insecure_port(f"{HOST}:0")
        await server.start()
        print(port, flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(time.process_time(), flush=True)
        await server.stop(None)


async def _events(engine: InstantEngine, tokenizer: Tokenizer, count: int) -> list[TextEvent]:
    """What the service shows of each token of the reply."""
    sampling = Sampling(0.0, 0, 1.0, 0.0, 0, count, 0, (), None, None)
    request = EngineRequest(REQUEST_ID, (0,), sampling)
    async with aclosing(stream(engine, tokenizer, request, TextRules())) as events:
        return [event async for event in events]


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(sys.argv[1], Path(sys.argv[2])))
