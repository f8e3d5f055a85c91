"""The scheduler under random traffic: everything finishes, nothing leaks, nobody starves."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.engine.fake_cache import World, request
from vivace.engine.errors import Overloaded
from vivace.engine.events import FinishReason

WINDOWS = [None, 1, 3, 4, 6, 13, 18]  # blocks have 4 tokens


@pytest.mark.parametrize("seed", range(112))  # four of each kind
def test_under_preemption_everything_finishes_and_no_block_leaks(seed):
    rng = random.Random(seed)
    world = World(
        num_blocks=rng.randint(12, 40),
        sharing=bool(seed % 2),
        window=WINDOWS[seed % 7],
        long_rope_from=(None, 22)[seed // 2 % 2],
        verify_hits=bool(seed // 4 % 2),
    )
    for i in range(30):
        stem = list(range(rng.choice([0, 8, 20])))
        tokens = stem + [rng.randint(0, 2) for _ in range(rng.randint(1, 20))]
        asked = {"prompt_logprobs": rng.choice([None, None, 0]), "start": rng.randint(1, 20)}
        world.add(
            request(i, tokens, rng.randint(0, 8), priority=rng.choice([0, 0, 1, -7]), **asked)
        )
    while world.live:
        world.step()
        world.check()
    assert len(world.finished) == 30


@pytest.mark.parametrize("window", [None, 13])
def test_preemption_really_happens_in_random_traffic(window):
    """The test above would prove little if its pools were never short."""
    total = num_voided = 0
    for seed in range(10):
        rng = random.Random(seed)
        world = World(num_blocks=7, window=window, long_rope_from=22)
        requests = [
            request(i, [rng.randint(0, 2) for _ in range(rng.randint(1, 20))], 8) for i in range(30)
        ]
        for one in requests:
            world.add(one)
        world.run()
        total += sum(one.num_preemptions for one in requests)
        num_voided += world.num_voided
    assert total > 10 and num_voided > 10


class Traffic(RuleBasedStateMachine):
    """Arrivals, aborts, deadlines and steps in any order, under memory pressure."""

    @initialize(
        num_blocks=st.integers(9, 40),
        max_step=st.integers(4, 40),
        max_running=st.integers(1, 4),
        sharing=st.booleans(),
        window=st.sampled_from([None, *WINDOWS]),
        long_rope_from=st.sampled_from([None, None, 5, 12, 20]),
    )
    def start(self, num_blocks, max_step, max_running, sharing, window, long_rope_from):
        self.world = World(
            num_blocks,
            max_step=max_step,
            max_running=max_running,
            max_waiting=12,
            sharing=sharing,
            window=window,
            long_rope_from=long_rope_from,
        )
        self.now = 0.0
        self.added = set()
        self.oldest_wait = 0

    @rule(
        stem=st.sampled_from([0, 4, 8, 9, 16]),
        tail=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        max_tokens=st.integers(0, 8),
        salt=st.sampled_from([b"", b"", b"other"]),
        patience=st.sampled_from([None, None, 2.0, 9.0]),
        start=st.sampled_from([None, None, None, None, 1, 1, 4, 9, 40]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
    )
    def arrive(self, stem, tail, max_tokens, salt, patience, start, priority):
        new = request(
            len(self.added),
            [*range(stem), *tail],
            max_tokens,
            salt=salt,
            priority=priority,
            deadline=None if patience is None else self.now + patience,
            prompt_logprobs=None if start is None else 0,
            start=start or 1,
        )
        try:
            self.world.add(new)
        except Overloaded:
            assert self.world.scheduler.num_waiting == 12
        else:
            self.added.add(new.id)

    @rule(which=st.integers(0, 30))
    def abort(self, which):
        name = str(which)
        self.world.end(name, FinishReason.ABORT)

    @rule(count=st.integers(1, 4))
    def steps(self, count):
        for _ in range(count):
            self.now += 1.0
            self.world.step(self.now)

    @invariant()
    def blocks_are_accounted_for(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.run()
            assert set(self.world.finished) == self.added
            assert self.world.pool.num_available == self.world.pool.num_blocks


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_a_request_that_needs_much_memory_starts_though_small_ones_keep_coming():
    world = World(num_blocks=10, max_running=4)
    for i in range(4):
        world.add(request(f"small {i}", [i] * 4, 4))
    world.step()
    world.add(request("big", [7] * 36, 2))
    for i in range(200):
        if "big" in world.finished:
            return
        world.add(request(f"later {i}", [i, i + 1], 3))
        world.step()
    raise AssertionError("the big request starved")


def test_a_request_that_becomes_long_goes_on_though_others_keep_coming():
    world = World(num_blocks=10, max_running=4, max_step=8, long_rope_from=24)
    world.add(request("long", range(100, 120), 20))
    for i in range(200):
        if "long" in world.finished:
            assert world.num_voided == 1
            return
        world.add(request(f"later {i}", [i, i + 1], 3))
        world.step()
    raise AssertionError("the long request starved")


def test_a_request_that_waits_for_a_prefix_starts_though_others_keep_coming():
    world = World(num_blocks=30, max_running=4, max_step=8)
    world.add(request("leader", range(40), 1))
    world.step()
    world.add(request("waiter", range(40), 1))
    for i in range(100):
        if "waiter" in world.finished:
            return
        world.add(request(f"later {i}", [*range(12), 50 + i], 2))
        world.step()
    raise AssertionError("the waiter starved")
