"""An engine process without a model: `python fake_engine.py SOCKET`. What it does stands in a JSON file, its "model".

A request's salt says how it behaves: empty, one token a step; otherwise one of the names below.
"""

import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from vivace.engine import process, wire
from vivace.engine.errors import ArtifactError, ConfigError, InvalidRequest, Overloaded
from vivace.engine.events import (
    EngineInfo,
    FinishReason,
    Loads,
    TokenEvent,
    TokenLogprobs,
    Usage,
)

FAILURES = {
    "config": ConfigError("cpu.threads must be a whole number of at least 1, got 0"),
    "artifact": ArtifactError("model.safetensors: tensor 'a' is missing"),
    "file": FileNotFoundError(2, "No such file or directory", "config.json"),
    "bug": RuntimeError("a bug while loading"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How the fake behaves."""

    architecture: str = "fake"
    step_s: float = 0.002
    most_requests: int = 1000
    load_s: float = 0.0
    failure: str = ""
    log: str = ""
    max_frame_bytes: int = wire.MAX_FRAME_BYTES


class FakeCore:
    """Gives request r the tokens r, r + 1, ... where r is the first id of its prompt."""

    def __init__(self, settings):
        self._settings = settings
        self._requests = {}
        self._ended = []
        self._num_tokens = {}
        self._num_steps = 0
        self._num_ops = 0
        names = EngineInfo.__dataclass_fields__
        values = dict.fromkeys(names, 1) | dict.fromkeys(
            ("dtype", "backend", "device", "kv_dtype", "weights", "isa"), "fp32"
        )
        values |= {"architecture": settings.architecture, "eos_token_ids": (1,), "load_s": 0.5}
        values["sparse"] = None
        self.info = EngineInfo(**values)

    def progress(self):
        return self._num_ops

    @property
    def has_work(self):
        return bool(self._requests or self._ended)

    def add(self, request, now):
        if request.salt == b"hang in add":
            threading.Event().wait()
        if request.salt == b"invalid":
            raise InvalidRequest("top_p must be in (0, 1], got 2.0")
        if request.request_id in self._requests:
            raise InvalidRequest("request_id is in use in the engine")
        if len(self._requests) >= self._settings.most_requests:
            raise Overloaded("the queue is full")
        self._requests[request.request_id] = request
        self._num_tokens[request.request_id] = 0

    def abort(self, request_id, now):
        self._log(f"abort {request_id} {self._num_steps}")
        if request_id not in self._requests:
            return False
        del self._requests[request_id]
        self._ended.append(request_id)
        return True

    def step(self, now):
        self._num_steps += 1
        events = [
            TokenEvent(id_, finish=FinishReason.ABORT, usage=self._usage(id_))
            for id_ in self._ended
        ]
        self._ended = []
        for id_, request in list(self._requests.items()):
            self._behave(request.salt)
            events.append(self._token(id_, request))
        time.sleep(self._settings.step_s)
        return events

    def loads(self):
        return Loads(num_running=len(self._requests), num_steps=self._num_steps)

    def _token(self, id_, request):
        number = self._num_tokens[id_]
        self._num_tokens[id_] += 1
        is_last = number + 1 == request.sampling.max_tokens
        if is_last:
            del self._requests[id_]
        token = request.prompt_token_ids[0] + number
        count = request.sampling.logprobs
        return TokenEvent(
            id_,
            (token,),
            logprobs=() if count is None else (logprobs(token, count),),
            prompt_logprobs=prompt_logprobs(request) if number == 0 else (),
            finish=FinishReason.LENGTH if is_last else None,
            usage=self._usage(id_) if is_last else None,
        )

    def _behave(self, salt):
        if salt == b"bug":
            raise RuntimeError("a bug in the loop")
        if salt == b"hang":
            threading.Event().wait()
        if salt == b"long":
            for _ in range(20):
                self._num_ops += 1
                time.sleep(0.1)

    def _usage(self, id_):
        return Usage(1, 0, self._num_tokens[id_], 0.0, 0.0, 0.0, 0)

    def _log(self, line):
        if self._settings.log:
            with Path(self._settings.log).open("a", encoding="utf-8") as file:
                print(line, file=file)


def logprobs(token, count):
    """Logprobs by which a token is recognised."""
    return TokenLogprobs(token, -0.5 * token, 1, tuple((token + i, -0.5) for i in range(count)))


def prompt_logprobs(request):
    """Of every position of the prompt but the first."""
    count = request.sampling.prompt_logprobs
    if count is None:
        return ()
    return (None, *(logprobs(token, count) for token in request.prompt_token_ids[1:]))


def load(config, progress):
    """In place of `core.load`."""
    settings = Settings(**json.loads(config.model.read_text(encoding="utf-8")))
    wire.MAX_FRAME_BYTES = settings.max_frame_bytes
    progress(0, 10)
    time.sleep(settings.load_s)
    if settings.failure:
        raise FAILURES[settings.failure]
    progress(10, 10)
    return FakeCore(settings)


if __name__ == "__main__":
    process.run(sys.argv[1], load)
