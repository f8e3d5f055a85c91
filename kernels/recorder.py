"""Ops noted down once and run again in one call: what a backend can offer to whoever runs the same ops at every step."""

from collections.abc import Callable, Sequence
from typing import Protocol


class Replay(Protocol):
    """Recorded ops, ready to run."""

    def run(self, sizes: Sequence[int], then: Callable[[], None] | None = None) -> None:
        """Run the ops as if they were called with buffers of these sizes, then those that `then` calls, in one go.

        `then` only notes its ops down, so nothing is there yet for it to read.
        """
        ...

    def profile(
        self, sizes: Sequence[int], then: Callable[[], None] | None = None
    ) -> list[tuple[str, float]]:
        """As `run`; the ops in order, each with the seconds that it took."""
        ...


class Recorder(Protocol):
    """Turns calls of ops into a replay."""

    def record(self, call_ops: Callable[[Sequence[int]], None], most: Sequence[int]) -> Replay:
        """Note down the ops that `call_ops` calls when it is given the sizes of a step, each from 0 to its `most`.

        Ops must be the same, in the same order and on the same memory, whatever the sizes: views of what was allocated
        before, and of uploaded arrays, whose memory such a backend shares. All of it must outlive the replay. Arguments
        are checked by the ops' contracts, here and never again. Raises ValueError, naming op and argument, if one varies
        with the sizes in another way than constant + factor * size.
        """
        ...
