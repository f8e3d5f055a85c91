"""The real scheduler over a fake model: it writes every position it is given, and checks every position it reads."""

from vivace.engine.blocks import BlockPool
from vivace.engine.config import SchedulerConfig
from vivace.engine.events import FinishReason, Sampling
from vivace.engine.prefix import PrefixIndex
from vivace.engine.request import Request
from vivace.engine.scheduler import Chunk, ContextRules, Scheduler

BLOCK = 4  # tokens


def sampling(max_tokens, *, min_tokens=0, prompt_logprobs=None, start=1, stop=()):
    return Sampling(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=0,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=stop,
        logprobs=None,
        prompt_logprobs=prompt_logprobs,
        prompt_logprobs_start=start,
    )


def request(
    name, tokens, max_tokens, *, prompt_logprobs=None, start=1, stop=(), min_tokens=0, **fields
):
    return Request(
        str(name),
        list(tokens),
        len(tokens),
        sampling(
            max_tokens,
            min_tokens=min_tokens,
            prompt_logprobs=prompt_logprobs,
            start=start,
            stop=stop,
        ),
        arrival=0.0,
        **fields,
        prompt_logprobs=[] if prompt_logprobs is None else [None] * min(start, len(tokens)),
    )


class World:
    """Requests, their scheduler, and what the cache's every place holds."""

    def __init__(
        self,
        num_blocks=64,
        *,
        max_step=16,
        max_running=8,
        max_waiting=100,
        sharing=True,
        window=None,
        long_rope_from=None,
        verify_hits=False,
    ):
        self.config = SchedulerConfig(
            max_step_tokens=max_step, max_running=max_running, max_waiting=max_waiting
        )
        self.context = ContextRules(window, long_rope_from)
        self.sharing = sharing
        self.prefix = PrefixIndex(BLOCK, b"key", verify_hits=verify_hits)
        self.pool = BlockPool(num_blocks, self.prefix)
        self.scheduler = Scheduler(
            self.config,
            self.pool,
            self.prefix,
            block_tokens=BLOCK,
            prefix_sharing=sharing,
            context=self.context,
        )
        self.see_step = None  # called with each step before it is computed
        self.cache = {}  # (block, offset) -> what was written there
        self.finished = {}  # id -> why
        self.live = {}  # id -> request
        self.num_computed = 0
        self.most_used = 0  # blocks, while any step was computed
        self.num_voided = 0  # requests that became long while they ran

    def add(self, new):
        self.scheduler.add(new)
        self.live[new.id] = new  # in order of arrival

    def end(self, name, why):
        ended = self.scheduler.end(name)
        if name in self.live:
            assert ended is self.live.pop(name)
            assert name not in self.finished
            self.finished[name] = why
        else:
            assert ended is None

    def step(self, now=0.0, token=None):
        for name in list(self.scheduler.expired(now)):
            self.end(name, FinishReason.DEADLINE)
        waiting = sorted(
            (one for one in self.live.values() if one.slot < 0), key=lambda one: -one.priority
        )
        computed = {one.id: one.num_computed for one in self.live.values()}
        step = self.scheduler.step(now)
        chunks = [*(Chunk(one, 1) for one in step.decoding), *step.chunks]
        self._check_starts(waiting, computed)
        assert bool(chunks) == bool(self.live), "work waits, and nothing runs"
        assert sum(c.num_tokens for c in chunks) <= self.config.max_step_tokens
        assert len({c.request.id for c in chunks}) == len(chunks) <= self.config.max_running
        self.most_used = max(self.most_used, self.pool.num_blocks - self.pool.num_available)
        if self.see_step is not None:
            self.see_step(step)
        for chunk in chunks:
            self._compute(chunk)
        self._commit(step, chunks, token)
        return chunks

    def _check_starts(self, waiting, computed):
        """Higher priority first, then first come; who is overtaken waits for a block that another is about to compute."""
        started = [one.slot >= 0 for one in waiting]
        num_preempted = sum(one.slot < 0 for one in self.live.values()) - started.count(False)
        assert not (num_preempted and any(started)), "started with what was taken from another"
        for i, one in enumerate(waiting):
            if not started[i] and any(started[i:]):
                assert self.sharing, "overtaken"
                assert any(
                    other.slot >= 0 and computed[other.id] < self._num_shared(one, other)
                    for other in self.live.values()
                ), "overtaken, and waits for nobody's prefix"

    def _num_shared(self, one, other):
        """Tokens of the full blocks that two requests have in common."""
        if (one.salt, self.is_long(one)) != (other.salt, self.is_long(other)):
            return 0
        num_blocks = min(len(one.tokens), len(other.tokens)) // BLOCK
        starts = range(BLOCK, (num_blocks + 1) * BLOCK, BLOCK)
        return max((n for n in starts if one.tokens[:n] == other.tokens[:n]), default=0)

    def is_long(self, one):
        limit = self.context.long_rope_from
        return limit is not None and len(one.tokens) > limit

    def content(self, one, position):
        """What a request writes to a position: it depends on all tokens up to there, and on how they are rotated."""
        return one.salt, self.is_long(one), tuple(one.tokens[: position + 1])

    def _compute(self, chunk):
        asked, start = chunk.request, chunk.request.num_computed
        for i in range(start, chunk.end):
            block = asked.blocks[i // BLOCK]
            assert self.pool.num_holders(block) == 1, "writes into a shared block"
            self.cache[block, i % BLOCK] = self.content(asked, i)
        for i in range(self._first_seen(start), chunk.end):
            block = asked.blocks[i // BLOCK]
            assert i // BLOCK >= asked.num_released, "sees a block that it does not hold"
            assert self.cache[block, i % BLOCK] == self.content(asked, i), "reads another's block"
        self.num_computed += chunk.num_tokens

    def _first_seen(self, position):
        return 0 if self.context.window is None else max(0, position - self.context.window + 1)

    def _commit(self, step, chunks, token):
        for chunk in chunks:
            self._record_prompt_logprobs(chunk)
        sampling = [chunk.request for chunk in chunks if chunk.samples]
        were_long = [one for one in sampling if self.is_long(one)]
        tokens = [len(one.tokens) % 3 if token is None else token for one in sampling]
        finished = self.scheduler.commit(step, tokens)
        for one, why in finished.items():
            self.finished[one.id] = why
            assert len(one.prompt_logprobs) in (0, one.num_prompt_tokens)
            assert why is FinishReason.STOP or one.num_generated == one.sampling.max_tokens
            del self.live[one.id]
        for one, sampled in zip(sampling, tokens, strict=True):
            assert one.tokens[-1] == sampled
            if one not in finished and self.is_long(one) and one not in were_long:
                assert one.num_computed == 0, "goes on with a cache that is void"
                self.num_voided += 1

    def _record_prompt_logprobs(self, chunk):
        one = chunk.request
        if one.wants_prompt_logprobs:
            known = len(one.prompt_logprobs)
            last = min(chunk.end, one.num_prompt_tokens - 1)
            assert one.num_computed < known, "a logprob's position was skipped"
            one.prompt_logprobs += [None] * max(0, last + 1 - known)

    def run(self, limit=10_000):
        for _ in range(limit):
            if not self.live:
                return
            self.step()
        raise AssertionError(f"not finished after {limit} steps: {sorted(self.live)}")

    def check(self):
        """Every block is held by exactly those who list it and may yet see it; nothing is lost; nobody is listed
        twice."""
        held = {}
        for one in self.live.values():
            blocks = one.blocks[one.num_released :]
            assert len(set(blocks)) == len(blocks)
            for block in blocks:
                held[block] = held.get(block, 0) + 1
            first_held = one.num_released * BLOCK
            next_seen = self._first_seen(one.num_computed)
            assert first_held <= next_seen < first_held + BLOCK
        for block in range(self.pool.num_blocks):
            assert self.pool.num_holders(block) == held.get(block, 0)
        assert self.pool.num_available == self.pool.num_blocks - len(held)
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)
