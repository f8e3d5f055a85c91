"""Many prompts from lines, to lines of JSON: some at a time, written in their order. A line that fails fails alone.

A line is a prompt, or, if it begins with `{`, a JSON object: `prompt` (text or token ids) or `messages`, and parameters,
which go before those of the command. Empty lines are left out.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from threading import Event, Semaphore
from typing import Any, NoReturn, TextIO

import grpc

from vivace.engine.errors import InvalidRequest
from vivace.serving import sampling_flags
from vivace.serving.client import Client, Stream

WINDOW = 4  # lines read ahead of the one to be written next, for each that runs: short ones pass a long one
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Item:
    """What a line asks for, or why it cannot be asked."""

    index: int  # of the line, from 0
    asked: Json  # prompt or messages
    params: Json
    problem: str | None = None


@dataclass(slots=True)
class _Reply:
    """What has come of one reply."""

    text: str = ""
    logprobs: list[Json] = field(default_factory=list)
    end: Json = field(default_factory=dict)

    def record(self) -> Json:
        logprobs = {"logprobs": self.logprobs} if self.logprobs else {}
        return {"text": self.text, **self.end, **logprobs}


def read_items(lines: Iterable[bytes], params: Mapping[str, Any]) -> Iterator[Item]:
    """What the lines ask for; `params` are those of the command."""
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            asked, own = _parse(line)
            yield Item(index, asked, {**params, **own})
        except (InvalidRequest, ValueError, RecursionError) as error:
            yield Item(index, {}, {}, f"line {index + 1}: {error}")


def run(client: Client, items: Iterable[Item], out: TextIO, *, concurrency: int) -> int:
    """Ask for all, write what comes of them. Returns how many failed. Closes the client if it is interrupted."""
    slots = Semaphore(concurrency * WINDOW)
    answers: SimpleQueue[Future[Json] | None] = SimpleQueue()
    left, ended = Event(), Event()
    with ThreadPoolExecutor(concurrency) as pool, ThreadPoolExecutor(1) as writing:
        writer = writing.submit(_write, answers, slots, left, ended, out)
        try:
            for item in items:
                slots.acquire()
                if ended.is_set():  # it failed: nobody reads any more
                    break
                answers.put(pool.submit(answer, client, item))
            answers.put(None)
            return writer.result()
        except BaseException:
            left.set()
            client.close()  # ends what runs
            pool.shutdown(wait=False, cancel_futures=True)
            answers.put(None)
            raise


def answer(client: Client, item: Item) -> Json:
    """The record of one item."""
    head = {"index": item.index, **item.asked}
    if item.problem is not None:
        return head | _error("INVALID_ARGUMENT", item.problem)
    try:
        if "messages" in item.asked:
            stream = client.chat(item.asked["messages"], **item.params)
        else:
            stream = client.generate(item.asked["prompt"], **item.params)
        return head | _collect(stream)
    except grpc.RpcError as error:
        return head | _error(error.code().name, error.details())
    except (TypeError, ValueError) as error:  # what protobuf has no room for
        return head | _error("INVALID_ARGUMENT", f"line {item.index + 1}: {error}")


def _write(
    answers: "SimpleQueue[Future[Json] | None]",
    slots: Semaphore,
    left: Event,
    ended: Event,
    out: TextIO,
) -> int:
    failed = 0
    try:
        while (future := answers.get()) is not None and not left.is_set():
            record = future.result()
            if left.is_set():  # what ends now was cut off
                break
            failed += "error" in record
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()
            slots.release()
        return failed
    finally:
        ended.set()
        slots.release()  # whoever waits for a slot shall see that this has ended


def _parse(line: bytes) -> tuple[Json, Json]:
    """What is asked, and the line's own parameters."""
    text = line.decode("utf-8").rstrip("\r\n")
    if not text.startswith("{"):
        return {"prompt": text}, {}
    try:
        fields = json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"not JSON: {error.msg}, character {error.pos + 1}") from error
    json.dumps(fields, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    asked = {name: fields.pop(name) for name in ("prompt", "messages") if name in fields}
    if len(asked) != 1:
        raise InvalidRequest("one of prompt and messages must be set")
    _check(asked)
    return asked, sampling_flags.from_json(fields)


def _check(asked: Json) -> None:
    prompt, messages = asked.get("prompt", ""), asked.get("messages", [{}])
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not (isinstance(prompt, str) or is_ids):
        raise InvalidRequest(f"prompt must be a text or a list of token ids, got {prompt!r}")
    if not (isinstance(messages, list) and all(isinstance(one, dict) for one in messages)):
        raise InvalidRequest(f"messages must be a list of objects, got {messages!r}")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _collect(stream: Stream) -> Json:
    replies: dict[int, _Reply] = {}
    prompt_logprobs: list[Json] = []
    for event in stream:
        reply = replies.setdefault(event.index, _Reply())
        reply.text += event.text
        reply.logprobs += map(asdict, event.logprobs)
        prompt_logprobs += map(asdict, event.prompt_logprobs)
        if event.usage is not None:
            reply.end = {
                "finish_reason": event.finish_reason,
                "stop_reason": event.stop_reason,
                "usage": asdict(event.usage),
            }
    records = [reply.record() for _, reply in sorted(replies.items())]
    all_of_them = {"replies": records} if len(records) > 1 else {}
    places = {"prompt_logprobs": prompt_logprobs} if prompt_logprobs else {}
    return {**records[0], **all_of_them, **places}


def _error(code: str, message: str) -> Json:
    return {"error": {"code": code, "message": message}}
