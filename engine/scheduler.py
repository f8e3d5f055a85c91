"""Decides which tokens each forward pass computes.

There is no prefill phase and no decode phase. A request has `num_pending` tokens, a step has a token budget, and the
scheduler spends it: first on requests that need one token, then on running prompts, oldest first, then on waiting
requests, those of higher priority first and equals in order of arrival. Chunked prefill, prefix hits and resuming after
preemption all fall out of that one rule. A request that may draw nothing (max_tokens 0) ends when its prompt is computed.

A request gets the blocks of all its known tokens when it starts to run, so only decoding can run out of blocks; then
the request that started last gives its blocks back, to be computed again: it waits at the place that its priority and
arrival give it, and nobody starts in that step. Priority orders those who wait and takes nothing from those who run.

Whoever would compute a block that a running request is about to compute waits for it instead, and others start before
it; the running one never waits, so there are no circles, and when it ends early the first waiter simply finds nobody to
wait for and becomes the one that computes.

Where every layer has a window, blocks that no later token can see go back to the pool while their request runs, and a
prefix is found by the blocks that the token after it sees, though earlier ones are gone. With LongRoPE, a request that
comes to have more than the original context's tokens goes back to its place in the queue, once, to be computed anew.
"""

import heapq
import itertools
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from vivace.engine.blocks import BlockPool
from vivace.engine.config import SchedulerConfig
from vivace.engine.errors import InvalidRequest, Overloaded
from vivace.engine.events import FinishReason
from vivace.engine.prefix import PrefixIndex
from vivace.engine.request import Request

# Rows of logits that a step spends on prompts: they cost vocabulary x 8 bytes each.
MAX_PROMPT_LOGPROB_ROWS = 64
# Blocks of those found to wait for a prefix, after which a step looks at nobody else: some 10 ms of hashing.
MAX_LOOKED_UP_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` pending tokens of one request that is not decoding."""

    request: Request
    num_tokens: int

    @property
    def end(self) -> int:
        """Tokens of the request that are computed once this chunk is."""
        return self.request.num_computed + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether a new token follows: the chunk reaches the end of what is known, and tokens are wanted."""
        request = self.request
        return self.end == len(request.tokens) and request.sampling.max_tokens > 0


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass computes: a token of each who decodes, then chunks. Those who decode are the same object for
    as long as they are the same, so that what is known of them can be kept."""

    decoding: tuple[Request, ...]
    chunks: Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class ContextRules:
    """What a model's positions mean for the cache; each None if the model has no such thing."""

    window: int | None = None  # the most positions that any layer sees, a token's own included
    long_rope_from: int | None = None  # of more tokens than this, all are rotated in another way


PLAIN_CONTEXT = ContextRules()
_place = attrgetter("place")


class Scheduler:
    """Not thread-safe: the engine loop is its only caller."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        prefix: PrefixIndex,
        *,
        block_tokens: int,
        prefix_sharing: bool = True,
        context: ContextRules = PLAIN_CONTEXT,
    ) -> None:
        self._config = config
        self._pool = pool
        self._prefix = prefix
        self._block_tokens = block_tokens
        self._prefix_sharing = prefix_sharing
        self._window = context.window
        self._long_rope_from = context.long_rope_from
        self._requests: dict[str, Request] = {}
        self._numbers = itertools.count()
        self._waiting: list[Request] = []  # by `place`
        self._running: dict[str, Request] = {}  # in the order they started to run
        self._decoding: tuple[Request, ...] | None = None  # of those; None: to be found again
        self._full: list[Request] = []  # of those, who need a block for their next token
        self._computing: dict[bytes, Request] = {}  # by digest: who runs and will compute it
        self._slots = list(range(config.max_running - 1, -1, -1))
        self._deadlines: list[tuple[float, str]] = []  # a heap; may name requests that are gone

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises Overloaded if the queue is full, InvalidRequest if it can never run."""
        if request.id in self._requests:
            raise InvalidRequest(f"request_id {request.id!r} is in use")
        most = request.num_prompt_tokens + request.sampling.max_tokens
        if self._num_blocks(most) > self._pool.num_blocks:
            raise InvalidRequest(
                f"prompt and max_tokens need {self._num_blocks(most)} blocks, "
                f"the cache has {self._pool.num_blocks}"
            )
        if len(self._waiting) >= self._config.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests are already waiting")
        self._requests[request.id] = request
        request.place = (-request.priority, next(self._numbers))
        insort(self._waiting, request, key=_place)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id))
        if (
            len(self._deadlines) > 2 * len(self._requests) + 64
        ):  # most are of requests that are gone
            live = self._requests.values()
            self._deadlines = [(one.deadline, one.id) for one in live if one.deadline is not None]
            heapq.heapify(self._deadlines)

    def end(self, request_id: str) -> Request | None:
        """Drop a request, wherever it is, and free its blocks at once. None if there is no such request."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        if request_id in self._running:
            self._stop_running(request)
        else:
            self._waiting.remove(request)
        return request

    def expired(self, now: float) -> Iterator[str]:
        """Ids of the requests whose deadline has come. The caller ends them."""
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            request = self._requests.get(request_id)
            if request is not None and request.deadline == deadline:
                yield request_id

    def step(self, now: float) -> Step:
        """Spend one step's token budget. Empty only when there is nothing to run."""
        num_running = len(self._running)
        for request in self._full:
            if request.slot >= 0:  # else: it has ended since, or was just preempted
                self._grow(request)
        self._full.clear()
        if self._decoding is None:
            self._decoding = tuple(one for one in self._running.values() if one.is_decoding)
        decoding, chunks = self._decoding, list[Chunk]()
        budget = self._config.max_step_tokens - len(decoding)
        logprob_rows = MAX_PROMPT_LOGPROB_ROWS
        if len(decoding) < len(self._running):
            for request in self._running.values():
                if budget and not request.is_decoding:
                    budget, logprob_rows = self._fill(request, chunks, budget, logprob_rows)
        if len(self._running) == num_running:  # else: what was preempted is not for others
            self._start_waiting(now, chunks, budget, logprob_rows)
        return Step(decoding, chunks)

    def commit(self, step: Step, sampled: Sequence[int]) -> dict[Request, FinishReason]:
        """Record a computed step and the tokens sampled after it: of those who decode, then of the chunks that sample.

        Returns who is finished, and why; their blocks are then free already.
        """
        finished: dict[Request, FinishReason] = {}
        for request, token in zip(step.decoding, sampled, strict=False):
            if request.num_computed < request.milestone and token not in request.stop_token_ids:
                request.num_computed += 1
                request.tokens.append(token)
            else:
                self._commit(request, 1, token, finished)
        tokens = iter(sampled[len(step.decoding) :])
        for chunk in step.chunks:
            token_after = next(tokens) if chunk.samples else None
            self._commit(chunk.request, chunk.num_tokens, token_after, finished)
            if chunk.request.is_decoding:
                self._decoding = None
        return finished

    def _commit(
        self,
        request: Request,
        num_tokens: int,
        sampled: int | None,
        finished: dict[Request, FinishReason],
    ) -> None:
        first = request.num_computed // self._block_tokens
        request.num_computed += num_tokens
        if self._prefix_sharing:
            self._publish(request, first)
        if self._window is not None:
            self._release_passed(request)
        if sampled is not None:
            request.tokens.append(sampled)
        elif request.num_pending:
            return
        finish = self._finish(request, sampled)
        if finish is not None:
            finished[request] = finish
            self.end(request.id)
        elif len(request.tokens) - 1 == self._long_rope_from:
            self._recompute(request)
        else:
            self._expect(request)

    def _finish(self, request: Request, sampled: int | None) -> FinishReason | None:
        sampling = request.sampling
        if sampled in request.stop_token_ids and request.num_generated > sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if request.num_generated >= sampling.max_tokens else None

    def _expect(self, request: Request) -> None:
        """See how far it can decode until more is to be done than to record a token."""
        size, count = self._block_tokens, request.num_computed
        if len(request.tokens) > len(request.blocks) * size:
            self._full.append(request)
        last = request.num_prompt_tokens + request.sampling.max_tokens - 2
        milestone = min(last, (count // size + 1) * size - 1)
        if self._window is not None:
            milestone = min(milestone, (request.num_released + 1) * size + self._window - 2)
        if self._long_rope_from is not None and count < self._long_rope_from:
            milestone = min(milestone, self._long_rope_from - 1)
        request.milestone = milestone

    def _fill(
        self, request: Request, chunks: list[Chunk], budget: int, logprob_rows: int
    ) -> tuple[int, int]:
        """Give a prompt as much of the budget as it can use; returns what is left."""
        num_tokens = min(request.num_pending, budget)
        if request.wants_prompt_logprobs:
            num_without = max(0, len(request.prompt_logprobs) - 1 - request.num_computed)
            num_tokens = min(num_tokens, num_without + logprob_rows)
            logprob_rows -= max(0, num_tokens - num_without)
        if num_tokens:
            chunks.append(Chunk(request, num_tokens))
        return budget - num_tokens, logprob_rows

    def _start_waiting(
        self, now: float, chunks: list[Chunk], budget: int, logprob_rows: int
    ) -> None:
        i = num_looked_up = 0
        while budget and i < len(self._waiting) and self._slots:
            request = self._waiting[i]
            if self._is_awaited(request.awaited):
                i += 1  # others may start before it
                continue
            if num_looked_up >= MAX_LOOKED_UP_BLOCKS:
                break  # the next step passes by those that this one looked at
            found = self._find_prefix(request)
            request.awaited = self._last_to_come(request, len(found))
            if request.awaited is not None:
                num_looked_up += len(request.digests)
                i += 1
                continue
            if not self._start(request, found, now):
                break  # running work is never preempted to start new work, nor is the first in line overtaken
            del self._waiting[i]
            budget, logprob_rows = self._fill(request, chunks, budget, logprob_rows)

    def _find_prefix(self, request: Request) -> list[int]:
        """Blocks that hold the request's first tokens already, of those that it need not compute itself.

        As in its block table: the numbers of what lies left of the next token's window say nothing.
        """
        if not self._prefix_sharing:
            return []
        self._extend_digests(request)
        digests = request.digests[: request.num_skippable // self._block_tokens]
        if self._window is not None:
            return self._find_in_window(digests)
        found: list[int] = []
        for digest in digests:
            block = self._prefix.find(digest)
            if block is None:
                break
            found.append(block)
        return found

    def _find_in_window(self, digests: Sequence[bytes]) -> list[int]:
        """The longest prefix of which everything is there that the token after it sees."""
        found = [0] * len(digests)
        num_found = i = len(digests)
        first = self._num_passed(num_found * self._block_tokens)
        while i > first:
            i -= 1
            block = self._prefix.find(digests[i])
            if block is None:  # any longer prefix that is still in question needs it
                num_found = i
                first = self._num_passed(num_found * self._block_tokens)
            else:
                found[i] = block
        return found[:num_found]

    def _last_to_come(self, request: Request, num_found: int) -> bytes | None:
        """The last of the blocks, from its next one on, that running requests are about to compute for it."""
        last = None
        for digest in request.digests[num_found : request.num_skippable // self._block_tokens]:
            if digest not in self._computing:
                break
            last = digest
        return last

    def _is_awaited(self, digest: bytes | None) -> bool:
        return digest in self._computing and self._prefix.find(digest) is None

    def _start(self, request: Request, found: list[int], now: float) -> bool:
        """Give a waiting request its blocks and a slot. False, with nothing changed, if there are not enough."""
        num_computed = len(found) * self._block_tokens
        num_passed = self._num_passed(num_computed)
        shared = found[num_passed:]
        self._pool.share(shared)
        needed = self._num_blocks(len(request.tokens)) - len(found)
        # About the next block of each that runs: or the newcomer would be preempted at once.
        reserve = len(self._running)
        if self._pool.num_available < needed + reserve:
            self._pool.release(shared)
            return False
        taken = self._pool.take(needed)
        assert taken is not None
        request.blocks = found + taken
        request.num_released = num_passed
        request.num_computed = num_computed
        request.slot = self._slots.pop()
        request.num_tabled = 0
        if request.first_scheduled is None:
            request.first_scheduled = now
            request.num_cached_tokens = request.num_computed
        self._running[request.id] = request
        self._decoding = None
        if self._prefix_sharing:
            for digest in request.digests[len(found) :]:
                self._computing.setdefault(digest, request)
        return True

    def _grow(self, request: Request) -> None:
        """Get a block for a decoding request's next token, from the newest if there is no other, be that itself."""
        while (taken := self._pool.take(1)) is None:
            victim = next(reversed(self._running.values()))
            self._stop_running(victim)
            victim.num_preemptions += 1
            insort(self._waiting, victim, key=_place)
            if victim is request:
                return
        request.blocks += taken

    def _stop_running(self, request: Request) -> None:
        for digest in request.digests[request.num_computed // self._block_tokens :]:
            if self._computing.get(digest) is request:
                del self._computing[digest]
        del self._running[request.id]
        self._decoding = None
        self._pool.release(request.blocks[request.num_released :])
        self._slots.append(request.slot)
        request.blocks, request.num_released, request.num_computed = [], 0, 0
        request.slot, request.milestone = -1, 0
        if request.sparse is not None:
            request.sparse.forget()

    def _num_passed(self, num_computed: int) -> int:
        """Leading blocks of which the token at position `num_computed`, and so any later one, sees nothing."""
        if self._window is None:
            return 0
        return max(0, num_computed - self._window + 1) // self._block_tokens

    def _release_passed(self, request: Request) -> None:
        num_passed = self._num_passed(request.num_computed)
        if num_passed > request.num_released:
            self._pool.release(request.blocks[request.num_released : num_passed])
            request.num_released = num_passed

    def _recompute(self, request: Request) -> None:
        """What is cached of a request that has just become long was rotated in the short way: it is void.

        Tokens only grow, so this happens to a request once at most, and it cannot starve the rest.
        """
        self._stop_running(request)
        request.digests.clear()
        insort(self._waiting, request, key=_place)

    def _publish(self, request: Request, first: int) -> None:
        """Let others find the blocks that have just become full, up to the first token that was computed sparsely: they asked
        for no approximation."""
        last = request.num_computed // self._block_tokens
        if last > first:
            self._extend_digests(request)
        sparse_from = None if request.sparse is None else request.sparse.first_position
        for i in range(first, last):
            digest = request.digests[i]
            if sparse_from is None or (i + 1) * self._block_tokens <= sparse_from:
                self._prefix.insert(digest, request.blocks[i])
            if self._computing.get(digest) is request:
                del self._computing[digest]

    def _extend_digests(self, request: Request) -> None:
        limit = self._long_rope_from
        is_long = limit is not None and len(request.tokens) > limit
        self._prefix.extend(request.digests, request.tokens, request.salt, is_long=is_long)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)
