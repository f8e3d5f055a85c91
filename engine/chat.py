"""Conversations to token ids: checked, rendered by the checkpoint's template in a process of its own, tokenized so that
what people say stays text. The template cannot hang, fill memory or reach this process.
"""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from vivace.engine import chat_worker, conversation
from vivace.engine.control_tokens import ControlTokens, Marks, choose_marks
from vivace.engine.conversation import Conversation
from vivace.engine.errors import ArtifactError, FailedPrecondition, InvalidRequest, Overloaded
from vivace.engine.tokenizer import LONG_TEXT_CHARS, Tokenizer

T = TypeVar("T")
# -P: a file of the working folder must not pass for a module of the engine's.
COMMAND = (sys.executable, "-P", "-m", "vivace.engine.chat_worker")
MESSAGE_CHARS = 64  # what a message costs beside its text
MAX_WAITING = 1024  # renderings of one model
ANSWER_LIMIT_S = 10.0  # of the wall clock: the worker's own limits count its own time, and a stopped process has none


class ChatEncoder:
    """Of one served model. Renders one conversation at a time, in the order they come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        source = tokenizer.template
        self._tokenizer = tokenizer
        self._control = ControlTokens(tokenizer.library)
        self._worker = None if source is None else Worker(source.text, source.variables)

    async def start(self) -> None:
        """Compile the template. Raises ArtifactError if it cannot be."""
        if self._worker is not None:
            try:
                await self._worker.start()
            except FailedPrecondition as error:
                raise ArtifactError(f"chat template: {error}") from error

    async def encode(self, wanted: Conversation) -> list[int]:
        """Token ids. Raises InvalidRequest, or FailedPrecondition if there is no template or it passes a limit."""
        if self._worker is None:
            raise FailedPrecondition("this checkpoint has no chat template; use Generate")
        is_long = _length(wanted) >= LONG_TEXT_CHARS
        frame, marks = await _run(is_long, self._prepare, wanted)
        try:
            rendered = await self._worker.render(frame)
        except InvalidRequest as error:  # a template may quote what it complains of
            raise InvalidRequest(marks.out_of(str(error))) from error
        return await _run(is_long, self._control.encode, rendered, marks)

    async def close(self) -> None:
        """End the worker. Idempotent."""
        if self._worker is not None:
            await self._worker.close()

    def _prepare(self, wanted: Conversation) -> tuple[bytes, Marks]:
        """What the worker is sent, and the marks in it."""
        assert self._tokenizer.template is not None
        conversation.check(wanted)
        variables = conversation.parse_variables(wanted.variables)
        texts = [self._tokenizer.template.text, json.dumps(variables, ensure_ascii=False)]

        def note(text: str) -> str:
            texts.append(text)
            return text

        conversation.template_messages(wanted, lambda role: note)
        first, second, end = choose_marks(texts, 3)
        marks = Marks(any=first, special=second)
        order = {
            "messages": conversation.template_messages(wanted, self._control.protector(marks)),
            "opens_turn": wanted.opens_turn,
            "continues_with": end if wanted.continue_final_message else None,
            "variables": variables,
        }
        return chat_worker.pack(order), marks


class Worker:
    """The process that renders, started again when it has been ended by a limit."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._order = chat_worker.pack({"source": source, "variables": dict(variables)})
        self._link: Link | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._exchanges: set[asyncio.Task[str]] = set()

    async def start(self) -> None:
        """Raises ArtifactError or FailedPrecondition for a template that cannot be compiled."""
        await self._in_turn(None)

    async def render(self, frame: bytes) -> str:
        """What the template writes. Raises InvalidRequest with its complaint, FailedPrecondition if it passes a limit,
        Overloaded if too many wait.
        """
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded(f"{self._num_waiting} conversations are waiting for the chat template")
        return await self._in_turn(frame)

    async def _in_turn(self, frame: bytes | None) -> str:
        self._num_waiting += 1
        try:
            await self._turn.acquire()  # a caller that leaves while it waits is not rendered
        finally:
            self._num_waiting -= 1
        exchange = asyncio.create_task(self._exchange(frame))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._exchanges.discard)
        exchange.add_done_callback(lambda _: self._turn.release())
        # One that leaves now must not leave its answer to the next.
        await asyncio.wait((exchange,))
        return exchange.result()

    async def close(self) -> None:
        """End the process. Idempotent."""
        for exchange in self._exchanges:
            exchange.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
        await self._end()

    async def _exchange(self, frame: bytes | None) -> str:
        """None: nothing but the start."""
        try:
            return await self._try(frame)
        except ConnectionError:  # whoever ended the process, it was not one of its limits
            pass
        try:
            return await self._try(frame)
        except ConnectionError as error:
            raise FailedPrecondition(str(error)) from error

    async def _try(self, frame: bytes | None) -> str:
        link = await self._started()
        return "" if frame is None else await self._ask(link, frame, chat_worker.TIME_LIMIT_S)

    async def _started(self) -> "Link":
        if self._link is None:
            self._link = await Link.open()
            try:
                await self._ask(self._link, self._order, chat_worker.COMPILE_LIMIT_S)
            except ArtifactError:  # there will be no other template
                await self._end()
                raise
        return self._link

    async def _ask(self, link: "Link", frame: bytes, limit_s: float) -> str:
        """Raises ConnectionError if it dies over it, but of a limit."""
        try:
            async with asyncio.timeout(limit_s + ANSWER_LIMIT_S):
                reply = await link.ask(frame)
        except TimeoutError as error:
            await self._end()
            raise FailedPrecondition(
                f"the chat template's process gave no answer for {limit_s + ANSWER_LIMIT_S:g} s"
            ) from error
        except (EOFError, OSError) as error:
            status = await self._end()
            if status == -signal.SIGPROF:
                raise FailedPrecondition(
                    f"the chat template ran for more than {limit_s:g} s"
                ) from error
            raise ConnectionError("the chat template's process has died") from error
        except BaseException:  # its answer would be taken for the next one's
            await self._end()
            raise
        if "code" in reply:
            raise chat_worker.ERRORS[reply["code"]](reply["message"])
        text: str = reply["text"]
        return text

    async def _end(self) -> int | None:
        link, self._link = self._link, None
        return None if link is None else await link.close()


@dataclass(frozen=True, slots=True)
class Link:
    """A worker's process and the socket that is its stdin and stdout."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @staticmethod
    async def open() -> "Link":
        """Start a process."""
        ours, theirs = socket.socketpair()
        with theirs:
            # Not by asyncio: uvloop forks, and gRPC would tell of it on stderr.
            process = subprocess.Popen(
                COMMAND,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
            )
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:  # nobody would know of it
            ours.close()
            process.kill()
            process.wait()
            raise
        return Link(process, reader, writer)

    async def ask(self, frame: bytes) -> Any:
        """Its answer. Raises EOFError or OSError if it dies over it."""
        self.writer.write(frame)
        await self.writer.drain()
        header = await self.reader.readexactly(chat_worker.HEADER.size)
        (length,) = chat_worker.HEADER.unpack(header)
        return json.loads(await self.reader.readexactly(length))

    async def close(self) -> int:
        """End the process; how it ended."""
        self.writer.close()
        self.process.kill()
        return await asyncio.to_thread(self.process.wait)


def _length(wanted: Conversation) -> int:
    """About as many characters as there are to look at."""
    return sum(
        MESSAGE_CHARS
        + len(message.content or "")
        + sum(MESSAGE_CHARS + len(call.arguments_json) for call in message.tool_calls)
        for message in wanted.messages
    )


async def _run(is_long: bool, function: Callable[..., T], *arguments: Any) -> T:
    """Call it; beside the loop if it takes long."""
    if is_long:
        return await asyncio.to_thread(function, *arguments)
    return function(*arguments)
