"""One generation in flight: its tokens, its blocks, its limits. The scheduler alone writes to it; the engine's commit
adds what was measured along the way (times, prompt logprobs, hidden states)."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vivace.engine.events import Pooling, Sampling, Sparse, TokenLogprobs

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class SparseState:
    """What has become of a request that may decode sparsely. `sparse.py` writes to it; the scheduler, to forget what was
    computed."""

    rules: Sparse
    num_units: int = 0  # leading ones that have metadata
    first_position: int | None = None  # of a token in the cache that was computed sparsely
    num_tokens: int = 0  # computed sparsely
    num_measured: int = 0
    kept_mass_sum: float = 0.0
    is_returned: bool = False  # to dense attention, for good

    def forget(self) -> None:
        """Its blocks are gone."""
        self.num_units, self.first_position = 0, None


@dataclass(eq=False, slots=True)
class Request:
    """A prompt and what has become of it."""

    id: str
    tokens: list[int]  # prompt, then everything sampled so far
    num_prompt_tokens: int
    sampling: Sampling
    arrival: float
    deadline: float | None = None
    salt: bytes = b""
    priority: int = 0
    place: tuple[int, int] = (0, 0)  # in the queue: what sorts first starts first
    pooling: Pooling | None = None
    num_computed: int = 0  # leading tokens whose K and V are in the cache
    blocks: list[int] = field(default_factory=list)  # cache blocks, in token order
    num_released: int = 0  # of those, leading ones that it does not hold: no window reaches them
    digests: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, so far
    awaited: bytes | None = None  # digest of the last block that it waits for another to compute
    slot: int = -1  # row in the tables of `batch.py`, while running
    num_tabled: int = 0  # blocks that those tables know already
    milestone: int = 0  # computed tokens; until then a sampled token is recorded and no more
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # found in the prefix cache when first scheduled
    first_scheduled: float | None = None
    first_token: float | None = None
    # So far, one a token; at first, None for all before the first that is wanted, and all None once they are sent.
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    hidden_sum_M: Array | None = None  # fp64, of the final hidden states pooled so far
    stop_token_ids: frozenset[int] = field(init=False)
    sparse: SparseState | None = field(init=False)  # None: dense

    def __post_init__(self) -> None:
        self.stop_token_ids = frozenset(self.sampling.stop_token_ids)
        rules = self.sampling.sparse
        self.sparse = None if rules is None else SparseState(rules)

    @property
    def num_pending(self) -> int:
        """Tokens known but not yet computed: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether all that it knows is computed but the last token, which was sampled: so is the next."""
        return len(self.tokens) == self.num_computed + 1 > self.num_prompt_tokens

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_skippable(self) -> int:
        """Leading tokens that it need not compute if a cache has them: never its last, nor any of which it wants more."""
        if self.pooling is Pooling.MEAN:
            return 0
        most = len(self.tokens) - 1
        if self.wants_prompt_logprobs:  # the token before one predicts it
            most = min(most, len(self.prompt_logprobs) - 1)
        return most

    @property
    def first_pooled(self) -> int:
        """The position from which on, to the prompt's end, hidden states are pooled, if any are."""
        return 0 if self.pooling is Pooling.MEAN else self.num_prompt_tokens - 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some prompt token still lacks the logprobs that were asked for."""
        return (
            self.sampling.prompt_logprobs is not None
            and len(self.prompt_logprobs) < self.num_prompt_tokens
        )
