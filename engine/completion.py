"""From an engine's tokens to text: streaming without splitting a character, and stop strings. Above every runtime.

The engine knows no text. When a stop string is found here, the engine's request is aborted, and its own final event,
which says that its blocks are free, is waited for and passed on as a stop.
"""

import codecs
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import msgspec

from vivace.engine.errors import Cancelled, DeadlineExceeded
from vivace.engine.events import EngineRequest, FinishReason, TokenEvent, TokenLogprobs, Usage
from vivace.engine.runtimes import Engine
from vivace.engine.sampling import TextRules
from vivace.engine.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoding shows for bytes that are not (yet) a character
MAX_UNSURE = 3  # replacements at the end of a text that more bytes may still turn into a character
MAX_TOKENS = 4  # decoded again with each new one, where characters end with tokens: decoding takes the longest
KEPT_TOKENS = 8  # likewise in the middle of a character: more than one takes


class TextEvent(msgspec.Struct, frozen=True):
    """A new piece of one request. The last one, and no other, has `finish` and `usage`. No dataclass: see `TokenEvent`."""

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    finish: FinishReason | None = None
    stop: int | str | None = None  # the token or string that ended it
    usage: Usage | None = None
    index: int = 0  # which reply of its request


class Detokenizer:
    """Text of a growing list of tokens, piece by piece; the pieces joined are the decoded whole.

    One exception: bytes written as byte tokens (`<0xE0>`) that are no UTF-8 are replaced one by one, while decoding all
    at once also replaces the good characters that stand beside them. Those are out before the bad byte is seen.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        self._left_out = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._byte_tokens = tokenizer.byte_tokens
        self._ids: list[int] = []  # the last few
        self._num_shown = 0  # characters of their text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_bytes = False  # that `_utf8` has yet to be told the end of

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty in the middle of a character."""
        if token_id in self._left_out:
            return ""
        byte = self._byte_tokens.get(token_id)
        if byte is not None:
            return self._push_byte(token_id, byte)
        if self._has_bytes:
            return self._end_bytes() + self._push_token(token_id)
        return self._push_token(token_id)

    def finish(self) -> str:
        """What is left: bytes that never became a character."""
        return self._end_bytes() + self._rest()

    def _push_byte(self, token_id: int, byte: bytes) -> str:
        is_first, rest = not self._ids, self._rest()
        self._ids = [token_id]  # what follows is decoded as text that stands behind something
        self._num_shown = len(self._decode(self._ids))
        if is_first and not self._num_shown:
            return ""  # a space that the decoder strips from the beginning
        self._has_bytes = True
        return rest + self._utf8.decode(byte)

    def _end_bytes(self) -> str:
        self._has_bytes = False
        return self._utf8.decode(b"", final=True)

    def _push_token(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        sure = max(self._num_shown, _num_sure(text))
        piece = text[self._num_shown : sure]
        self._num_shown = sure
        if len(self._ids) >= MAX_TOKENS:
            self._forget(is_whole=sure == len(text))
        return piece

    def _forget(self, *, is_whole: bool) -> None:
        """Drop tokens that the text to come does not depend on: at the end of a character all but one, which decoders may
        look at. What is left decodes to other text, perhaps, but to as much of it as is never shown again."""
        if is_whole:
            self._ids = self._ids[-1:]
            self._num_shown = len(self._decode(self._ids))
        elif len(self._ids) >= 2 * KEPT_TOKENS:
            self._ids = self._ids[-KEPT_TOKENS:]
            self._num_shown = _num_sure(self._decode(self._ids))

    def _rest(self) -> str:
        return self._decode(self._ids)[self._num_shown :]


def _num_sure(text: str) -> int:
    """Characters that more tokens cannot change."""
    if not text.endswith(REPLACEMENT):
        return len(text)
    tail = text[-MAX_UNSURE:]
    return len(text) - (len(tail) - len(tail.rstrip(REPLACEMENT)))


class Completion:
    """One request's text. `push` its engine events in order; stop at the one that comes back with `finish`."""

    def __init__(self, tokenizer: Tokenizer, rules: TextRules) -> None:
        self._rules = rules
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=rules.skip_special_tokens)
        self._num_tokens = 0
        self._held = ""  # text that may yet turn out to begin a stop string
        self.matched: str | None = (
            None  # the stop string that was found: abort the engine's request
        )

    def push(self, event: TokenEvent) -> TextEvent:
        """What the event shows. After a match, tokens are dropped, and the engine's final event becomes a stop."""
        if self.matched is not None:
            return self._after_match(event)
        if not self._rules.stop and event.finish is None:
            return self._plain(event)
        text, count = "", 0
        for token_id in event.token_ids:
            count += 1
            is_stop = token_id == event.stop_token_id and count == len(event.token_ids)
            text += self._take(token_id, is_stop=is_stop)
            if self._has_matched():
                break
        if event.finish is not None and not self._has_matched():
            text += self._rest()
        shown = TextEvent(
            event.request_id,
            text=text,
            token_ids=event.token_ids[:count],
            logprobs=event.logprobs[:count],
            prompt_logprobs=event.prompt_logprobs,
        )
        if event.finish is None:
            return shown
        if self._has_matched():
            return self._finish_matched(shown, event)
        return msgspec.structs.replace(
            shown, finish=event.finish, stop=event.stop_token_id, usage=event.usage
        )

    def _plain(self, event: TokenEvent) -> TextEvent:
        """What nearly every event shows: no stop string to look for, no end."""
        token_ids, text = event.token_ids, ""
        self._num_tokens += len(token_ids)
        for token_id in token_ids:
            text += self._detokenizer.push(token_id)
        return TextEvent(event.request_id, text, token_ids, event.logprobs, event.prompt_logprobs)

    def _has_matched(self) -> bool:
        return self.matched is not None

    def _take(self, token_id: int, *, is_stop: bool) -> str:
        """Count a token; returns what may be shown. A stop token is never shown."""
        self._num_tokens += 1
        return "" if is_stop else self._match(self._detokenizer.push(token_id))

    def _rest(self) -> str:
        """At the end nothing is held back: neither half characters nor half stop strings."""
        text = self._match(self._detokenizer.finish())
        return text if self._has_matched() else text + self._held

    def _match(self, piece: str) -> str:
        """Add a piece of text; returns what may be shown now."""
        text = self._held + piece
        if not self._rules.stop:
            return text
        if self._num_tokens <= self._rules.min_tokens:
            self._held = text[self._first_possible_start(text) :]
            return text[: len(text) - len(self._held)]
        # A match ends in the new piece: what ended before it was too early to count.
        fresh = len(self._held)
        found = [
            (start, stop)
            for stop in self._rules.stop
            if (start := text.find(stop, max(0, fresh - len(stop) + 1))) >= 0
        ]
        if found:
            # The first to be complete, and of those that end together the longest: the same however text is cut in tokens.
            start, self.matched = min(found, key=lambda one: (one[0] + len(one[1]), one[0]))
            self._held = ""
            return text[: start + len(self.matched) if self._rules.include_stop else start]
        self._held = text[self._first_possible_start(text) :]
        return text[: len(text) - len(self._held)]

    def _first_possible_start(self, text: str) -> int:
        """Where the earliest stop string could begin that the text so far does not complete."""
        longest = max(map(len, self._rules.stop))
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._rules.stop):
                return start
        return len(text)

    def _after_match(self, event: TokenEvent) -> TextEvent:
        empty = TextEvent(event.request_id)
        return empty if event.finish is None else self._finish_matched(empty, event)

    def _finish_matched(self, shown: TextEvent, event: TokenEvent) -> TextEvent:
        assert event.usage is not None
        usage = replace(event.usage, completion_tokens=self._num_tokens)
        return msgspec.structs.replace(
            shown, finish=FinishReason.STOP, stop=self.matched, usage=usage
        )


async def stream(
    engine: Engine, tokenizer: Tokenizer, request: EngineRequest, rules: TextRules
) -> AsyncGenerator[TextEvent]:
    """Text events of one request; exactly one is final, a stop or length. Closing this early aborts the request.

    Raises Cancelled or DeadlineExceeded for a request that was ended, and what the engine refuses it with.
    """
    completion = Completion(tokenizer, rules)
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            before = completion.matched
            shown = completion.push(event)
            if shown.finish is not None:
                raise_if_ended(shown.finish)
            elif completion.matched is not None and before is None:
                # Before yielding: a slow reader must not hold blocks.
                await engine.abort(request.request_id)
            if shown.text or shown.token_ids or shown.prompt_logprobs or shown.finish is not None:
                yield shown


def raise_if_ended(finish: FinishReason | None) -> None:
    """Raise Cancelled or DeadlineExceeded for the end of a request that did not end by itself."""
    if finish is FinishReason.ABORT:
        raise Cancelled("aborted by its id")
    if finish is FinishReason.DEADLINE:
        raise DeadlineExceeded("the deadline has passed")
