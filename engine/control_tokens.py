"""Keeps text of a conversation from becoming control tokens, whatever the chat template does with it.

Before rendering, each character of protected text that a control token could begin with gets a mark behind it, a character
that occurs nowhere else. After rendering the marks are taken out, and where a control token would begin at a marked
character, the text is cut behind that character: its two sides are tokenized apart. Text without such a place is tokenized
whole, as it would be without all this.

Control tokens are all that were added to the vocabulary, but white space and single letters. The system's text (the operator
writes it) is not protected; the assistant's is protected from the special ones alone, since templates look for others in it.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import quote

import tokenizers

from vivace.engine.errors import InvalidRequest
from vivace.engine.tokenizer import LONG_TEXT_CHARS

OPERATOR_ROLES = ("system", "developer")
MARKS = range(0xE000, 0xF900)  # for private use: texts hold them rarely, and none holds all
GUARDS = ("a", "\n", ".", "0")  # put before what stands behind a cut, and taken off again


@dataclass(frozen=True, slots=True)
class _Kind:
    """Some control tokens."""

    ids: frozenset[int]
    spelled: re.Pattern[str]  # any of them
    first: frozenset[str]  # letters they begin with

    @staticmethod
    def of(tokens: Mapping[int, tokenizers.AddedToken]) -> "_Kind":
        spellings = sorted((token.content for token in tokens.values()), key=len, reverse=True)
        return _Kind(
            frozenset(tokens),
            re.compile("|".join(map(re.escape, spellings)) or r"(?!)"),
            frozenset(spelling[0] for spelling in spellings),
        )


@dataclass(frozen=True, slots=True)
class Marks:
    """Characters that stand behind what could begin a control token: any one, or a special one."""

    any: str
    special: str

    def split(self, text: str) -> tuple[list[str], list[str]]:
        """The pieces between the marks, and the mark behind each but the last."""
        either = "|".join(f"({_spelled(mark)})" for mark in (self.any, self.special))
        pieces, marks, end = [], [], 0
        for found in re.finditer(either, text):
            pieces.append(text[end : found.start()])
            marks.append(self.any if found.lastindex == 1 else self.special)
            end = found.end()
        return [*pieces, text[end:]], marks

    def out_of(self, text: str) -> str:
        """The text without them."""
        return "".join(self.split(text)[0])


class ControlTokens:
    """Of one tokenizer."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        control = {one: token for one, token in added.items() if len(token.content.strip()) > 1}
        special = {one: token for one, token in control.items() if token.special}
        self._any, self._special = _Kind.of(control), _Kind.of(special)
        self.ids = self._any.ids
        # The first letter of what goes on as a special token does; never of another added token, which templates look for.
        starts = {token.content[:2] for token in special.values()}
        others = [token.content for one, token in control.items() if one not in special]
        self._may_be_special = re.compile(
            "|".join(
                f"{re.escape(start[0])}(?={re.escape(start[1:])})"
                + "".join(
                    f"(?<!(?={re.escape(other)}).)" for other in others if other[0] == start[0]
                )
                for start in sorted(starts)
            )
            or r"(?!)"
        )
        # Such are looked for in text that has been normalised: other characters may become their first.
        self._is_normalized = any(token.normalized for token in control.values())

    def protector(self, marks: Marks) -> Callable[[str], Callable[[str], str]]:
        """What to do with the texts of a role."""

        def of_role(role: str) -> Callable[[str], str]:
            if role in OPERATOR_ROLES:
                return str
            if role == "assistant":
                return lambda text: self._may_be_special.sub(rf"\g<0>{marks.special}", text)
            return lambda text: self._marked(text, marks.any, self._any.first)

        return of_role

    def encode(self, rendered: str, marks: Marks) -> list[int]:
        """Token ids of what the template made of protected texts."""
        pieces, found_marks = marks.split(rendered)
        text = "".join(pieces)
        marked: dict[int, _Kind] = {}  # by the place of a marked character, in order
        length = 0
        for piece, mark in zip(pieces, found_marks, strict=False):
            length += len(piece)
            marked[length - 1] = self._any if mark == marks.any else self._special
        cuts = [place + 1 for place, kind in marked.items() if kind.spelled.match(text, place)]
        while True:
            ids, found = self._encode_cut(text, [0, *cuts, len(text)], marked)
            if not found:
                return ids
            assert not found <= set(cuts)  # a token of several letters is gone once it is cut
            cuts = sorted({*cuts, *found})

    def _marked(self, text: str, mark: str, first: frozenset[str]) -> str:
        if self._is_normalized and not text.isascii() and self._tokenizer.normalizer is not None:
            normalize = self._tokenizer.normalizer.normalize_str
            first = first | {letter for letter in set(text) if normalize(letter)[:1] in first}
        for letter in first:
            if letter in text:
                text = text.replace(letter, letter + mark)
        return text

    def _encode_cut(
        self, text: str, borders: Sequence[int], marked: Mapping[int, _Kind]
    ) -> tuple[list[int], set[int]]:
        """Ids of the pieces, and where to cut as well: control tokens that came of protected text all the same."""
        ids: list[int] = []
        cuts: set[int] = set()
        places = list(marked)
        for start, end in pairwise(borders):
            piece = self._encode_piece(text[start:end], is_first=start == 0)
            ids += piece.ids
            if not places or self.ids.isdisjoint(piece.ids):
                continue
            for token_id, (first, last) in zip(piece.ids, piece.offsets, strict=True):
                if token_id in self.ids:
                    i = bisect_left(places, start + first)
                    place = places[i] if i < len(places) else len(text)
                    if place < start + last and token_id in marked[place].ids:
                        cuts.add(place + 1)
        return ids, cuts

    def _encode_piece(self, text: str, *, is_first: bool) -> "_Piece":
        """What stands behind a cut is encoded as going on from something: some tokenizers put a space before a text."""
        for guard in () if is_first else GUARDS:
            encoding = self._encode(guard + text)
            offsets = encoding.offsets
            count = sum(last <= len(guard) for _, last in offsets)
            if all(first >= len(guard) for first, _ in offsets[count:]):
                moved = [(first - len(guard), last - len(guard)) for first, last in offsets[count:]]
                return _Piece(encoding.ids[count:], moved)
        encoding = self._encode(text)
        return _Piece(encoding.ids, encoding.offsets)

    def _encode(self, text: str) -> tokenizers.Encoding:
        if len(text) < LONG_TEXT_CHARS:
            return self._tokenizer.encode(text, add_special_tokens=False)
        # A batch alone releases the GIL meanwhile.
        [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=False)
        return encoding


@dataclass(frozen=True, slots=True)
class _Piece:
    """Ids, and where each lies in the text."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def choose_marks(texts: Sequence[str], count: int) -> list[str]:
    """Characters that none of these texts holds, however it spells them. Raises InvalidRequest where they hold all that
    could be one.
    """
    found: list[str] = []
    for code in MARKS:
        spelled = re.compile(_spelled(chr(code)))
        if not any(spelled.search(text) for text in texts):
            found.append(chr(code))
            if len(found) == count:
                return found
    raise InvalidRequest("messages must leave some of the characters U+E000..U+F8FF unused")


def _spelled(mark: str) -> str:
    """A pattern of what templates make of a mark: itself, JSON's or Python's escape (once or oftener), a URL's."""
    return rf"{mark}|\\+u(?i:{ord(mark):04x})|(?i:{quote(mark)})"
