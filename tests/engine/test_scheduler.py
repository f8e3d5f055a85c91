"""The scheduler's promises, with the real pool and prefix index, and no model."""

import pytest

from tests.engine.fake_cache import World, request
from vivace.engine import prefix
from vivace.engine.errors import InvalidRequest, Overloaded
from vivace.engine.events import FinishReason, Pooling
from vivace.engine.scheduler import MAX_LOOKED_UP_BLOCKS, MAX_PROMPT_LOGPROB_ROWS


def test_a_long_prompt_does_not_stop_others_decoding():
    world = World()
    world.add(request("a", [1] * 3, 30))
    world.step()
    world.add(request("b", [0] * 100, 1))
    assert [(c.request.id, c.num_tokens) for c in world.step()] == [("a", 1), ("b", 15)]


@pytest.mark.parametrize("priority", [0, 1])
def test_a_step_that_preempts_starts_nobody_and_takes_the_newest(priority):
    world = World(num_blocks=8, sharing=False)
    world.add(request("old", [1] * 7, 20))
    world.add(request("new", [2] * 15, 12))
    world.step()
    world.step()
    while world.live["old"].num_preemptions == world.live["new"].num_preemptions == 0:
        world.add(request(f"later {world.num_computed}", [3], 1, priority=priority))
        chunks = world.step()
    assert [c.request.id for c in chunks] == ["old"]
    assert world.live["new"].num_preemptions == 1 and world.live["new"].blocks == []
    world.run()
    assert set(world.finished.values()) == {FinishReason.LENGTH}


def test_nobody_starts_only_to_be_preempted_at_once():
    world = World(num_blocks=4, sharing=False)
    world.add(request("old", [1] * 8, 8))
    world.step()
    world.add(
        request("new", [2] * 4, 4)
    )  # one block is free for it, and the old one's next token needs another
    world.add(request("newer", [3] * 4, 4))
    everyone = list(world.live.values())
    world.run()
    assert [one.num_preemptions for one in everyone] == [0, 0, 0]


def test_an_id_used_again_has_its_own_deadline():
    world = World()
    world.add(request("a", [1], 1, deadline=5.0))
    world.run()
    del world.finished["a"]
    world.add(request("a", [1], 1, deadline=9.0))
    assert list(world.scheduler.expired(5.0)) == []
    assert list(world.scheduler.expired(9.0)) == ["a"]


def test_those_who_wait_for_a_prefix_keep_their_place_in_line():
    world = World(max_running=2, max_step=64)
    world.add(request("leader", range(24), 1))
    world.add(request("first", range(24), 2))
    world.add(request("second", range(24), 2))
    for i in range(4):
        world.add(request(f"later {i}", [50 + i], 1))
    assert [c.request.id for c in world.step()] == ["leader", "later 0"]
    assert [c.request.id for c in world.step()] == ["first", "second"]


def count_look_ups(world, monkeypatch):
    """Blocks that are hashed or looked up, one entry each."""
    look_ups = []
    find, extend = world.prefix.find, world.prefix.extend

    def counted_find(digest):
        look_ups.append(digest)
        return find(digest)

    def counted_extend(digests, *args, **fields):
        known = len(digests)
        extend(digests, *args, **fields)
        look_ups.extend(digests[known:])

    monkeypatch.setattr(world.prefix, "find", counted_find)
    monkeypatch.setattr(world.prefix, "extend", counted_extend)
    return look_ups


def test_a_step_looks_up_few_of_those_who_wait_for_a_prefix_and_each_once(monkeypatch):
    world = World(num_blocks=400, max_step=100)
    prompt = range(600)  # of which the leader computes what a step has rows of logits for
    world.add(request("leader", prompt, 1, prompt_logprobs=0))
    for i in range(90):
        world.add(request(i, [*prompt, 600 + i], 1))
    world.add(request("other", [1000], 30))
    look_ups = count_look_ups(world, monkeypatch)
    num_steps = 0
    while world.live["other"].slot < 0:
        assert num_steps < 6, "who waits for nobody is not reached, as many wait before it"
        look_ups.clear()
        world.step()
        num_steps += 1
        # A block of each that waits already. Of the last that is looked up and of the leader, a prompt more each.
        assert len(look_ups) <= 2 * MAX_LOOKED_UP_BLOCKS + 90 + 3 * 150
    assert num_steps > 1
    look_ups.clear()
    world.step()
    assert len(look_ups) <= 90, "looked up again before what it waits for is there"
    assert world.live["leader"].num_computed < 600
    world.run()


def test_who_waits_goes_on_when_another_than_the_one_it_waits_for_has_computed_the_block():
    """One that pools all of its prompt computes what another computes too, and here it is faster."""
    world = World(num_blocks=200, max_step=600)
    world.add(request("slow", range(200), 1, prompt_logprobs=0))
    world.add(request("fast", range(200), 0, pooling=Pooling.MEAN))
    world.add(request("waits", range(200), 1))
    assert [c.request.id for c in world.step()] == ["slow", "fast"]
    assert [c.request.id for c in world.step()] == ["slow", "waits"]
    assert world.live["slow"].num_computed < 200
    world.run()


def test_deadlines_of_requests_that_are_gone_are_not_kept():
    world = World()
    world.add(request("live", [1], 150, deadline=5.0))
    for i in range(140):
        world.add(request(i, [1], 1, deadline=1e9))
        world.step()
    assert len(world.live) == 1
    assert len(world.scheduler._deadlines) <= 2 * 2 + 64
    assert list(world.scheduler.expired(5.0)) == ["live"]


def test_those_of_higher_priority_start_first_and_equals_in_order_of_arrival():
    world = World(max_running=1)
    for name, priority in (("a", 0), ("b", 2), ("c", -1), ("d", 2), ("e", 0)):
        world.add(request(name, [ord(name)], 1, priority=priority))
    started = [c.request.id for _ in range(5) for c in world.step()]
    assert started == ["b", "d", "a", "e", "c"]


def test_priority_takes_nothing_from_those_who_run():
    world = World(max_running=1)
    world.add(request("runs", [1], 3))
    world.step()
    world.add(request("urgent", [2], 1, priority=9))
    started = [c.request.id for _ in range(3) for c in world.step()]
    assert started == ["runs", "runs", "urgent"]


@pytest.mark.parametrize("priority", [0, 1])
def test_a_preempted_request_goes_back_to_its_place(priority):
    """Before those who came later, but behind those of higher priority."""
    world = World(num_blocks=8, sharing=False)
    world.add(request("old", [1] * 7, 20))
    new = request("new", [2] * 15, 12)
    world.add(new)
    while not new.num_preemptions:
        world.step()
    world.add(request("later", [3] * 11, 12, priority=priority))
    while new.slot < 0 and world.live["later"].slot < 0:
        world.step()
    assert (new.slot < 0) == bool(priority)
    world.run()


def test_a_full_queue_is_overloaded():
    world = World(max_waiting=1)
    world.add(request("a", [0], 2))
    with pytest.raises(Overloaded, match="1 requests are already waiting"):
        world.add(request("b", [0], 2))


def test_what_can_never_fit_is_refused_at_the_door():
    world = World(num_blocks=4)
    with pytest.raises(InvalidRequest, match="need 5 blocks, the cache has 4"):
        world.add(request("a", [0] * 8, 9))
    world.add(request("b", [0] * 8, 8))
    world.run()


def test_an_id_in_use_is_refused():
    world = World()
    world.add(request("a", [0], 2))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        world.add(request("a", [0], 2))


def test_a_second_request_with_the_same_prompt_computes_only_its_end():
    world = World()
    world.add(request("a", range(10), 1))
    world.run()
    before = world.num_computed
    world.add(request("b", range(10), 1))
    world.run()
    assert world.num_computed - before == 2  # two blocks of four were found


def test_prefixes_are_not_shared_across_salts():
    world = World()
    for salt in (b"tenant 1", b"tenant 2"):
        world.add(request(salt, range(12), 1, salt=salt))
        world.run()
    assert world.num_computed == 24


def test_requests_that_share_a_prefix_compute_it_once_though_they_come_together():
    world = World()
    for i in range(4):
        world.add(request(i, [*range(40), 100 + i], 1))
    world.run()
    assert world.num_computed == 41 + 3


def test_those_who_do_not_share_the_prefix_overtake_those_who_wait_for_it():
    world = World(max_step=24)
    world.add(request("leader", range(40), 1))
    world.add(request("waits", range(40), 1))
    world.add(request("other", range(100, 120), 1))
    assert [c.request.id for c in world.step()] == ["leader"]
    assert [c.request.id for c in world.step()] == ["leader", "other"]


@pytest.mark.parametrize("way", ["abort", "deadline"])
def test_when_the_leader_of_a_prefix_ends_early_a_waiter_takes_over(way):
    world = World()
    world.add(request("leader", range(40), 1, deadline=5.0 if way == "deadline" else None))
    world.add(request("first", range(40), 1))
    world.add(request("second", range(40), 1))
    world.step(now=1.0)
    if way == "abort":
        world.end("leader", FinishReason.ABORT)
    chunks = world.step(now=6.0)
    assert [c.request.id for c in chunks] == ["first"]
    assert chunks[0].request.num_cached_tokens == 16  # what the leader had finished is not lost
    world.run()
    assert world.finished["first"] == world.finished["second"] == FinishReason.LENGTH


def test_when_the_leader_of_a_prefix_is_preempted_nobody_hangs():
    world = World(num_blocks=14, max_step=8, max_running=8)
    world.add(request("old", [9] * 3, 30))
    world.step()
    world.add(request("leader", range(36), 4))
    world.add(request("waiter", range(36), 4))
    world.run()
    assert set(world.finished.values()) == {FinishReason.LENGTH}


def test_a_deadline_ends_a_request_wherever_it_is_and_frees_its_blocks():
    world = World(max_running=2, max_step=4)
    world.add(request("decodes", [1], 30, deadline=10.0))
    world.step(now=0.0)
    world.add(request("prefills", range(50), 5, deadline=10.0))
    world.step(now=1.0)
    world.add(request("queued", [2], 5, deadline=10.0))
    world.step(now=2.0)
    assert world.scheduler.num_waiting == 1
    for name in list(world.scheduler.expired(10.0)):
        world.end(name, FinishReason.DEADLINE)
    assert world.live == {} and world.pool.num_available == world.pool.num_blocks


def test_prompt_logprobs_take_a_bounded_number_of_rows_a_step_and_no_cached_ones():
    world = World(num_blocks=200, max_step=200)
    world.add(request("a", range(100), 1))
    world.run()
    world.add(request("b", range(100), 1, prompt_logprobs=0))
    world.add(request("c", range(100), 1, prompt_logprobs=0))
    assert sum(c.num_tokens for c in world.step()) == MAX_PROMPT_LOGPROB_ROWS
    world.run()
    assert world.num_computed == 300


def test_a_request_that_draws_nothing_ends_with_its_prompt():
    world = World()
    one = request("a", range(20), 0)
    world.add(one)
    assert [(c.num_tokens, c.samples) for c in world.step()] == [(16, False)]
    assert world.finished == {}
    assert [(c.num_tokens, c.samples) for c in world.step()] == [(4, False)]
    assert world.finished == {"a": FinishReason.LENGTH} and one.num_generated == 0
    assert world.pool.num_available == world.pool.num_blocks


def test_a_stop_token_ends_a_request_anywhere_in_a_block_but_not_before_min_tokens():
    for min_tokens in range(9):
        world = World()
        one = request("a", [1] * 3, 12, stop=(8, 9), min_tokens=min_tokens)
        world.add(one)
        while world.live:
            world.step(token=9)
        assert world.finished == {"a": FinishReason.STOP}
        assert one.num_generated == min_tokens + 1
        assert world.pool.num_available == world.pool.num_blocks


def test_a_prompt_that_draws_nothing_may_fill_the_cache():
    world = World(num_blocks=4)
    world.add(request("a", range(16), 0))
    world.run()
    with pytest.raises(InvalidRequest, match="need 5 blocks, the cache has 4"):
        world.add(request("b", range(17), 0))


def test_a_prompt_that_draws_nothing_computes_its_last_token_though_all_of_it_is_cached():
    world = World()
    for name in ("a", "b"):
        before = world.num_computed
        world.add(request(name, range(16), 0))
        world.run()
    assert world.num_computed - before == 4


def test_prompts_that_draw_nothing_share_steps_with_those_that_decode():
    world = World()
    world.add(request("decodes", [1] * 3, 30))
    world.step()
    world.add(request("a", range(20), 0))
    steps = [[(c.request.id, c.num_tokens, c.samples) for c in world.step()] for _ in range(2)]
    assert steps == [
        [("decodes", 1, True), ("a", 15, False)],
        [("decodes", 1, True), ("a", 5, False)],
    ]
    assert "decodes" in world.live and world.finished == {"a": FinishReason.LENGTH}


def test_positions_before_the_first_wanted_logprobs_may_be_cached_and_take_no_rows():
    world = World(num_blocks=200, max_step=200)
    world.add(request("a", range(100), 0, prompt_logprobs=0, start=60))
    assert [c.num_tokens for c in world.step()] == [100]  # 59 without, 41 with logprobs
    world.add(request("b", range(100), 0, prompt_logprobs=0, start=60))
    assert [c.num_tokens for c in world.step()] == [100 - 56]  # 14 blocks before position 59
    world.add(request("c", range(200, 300), 0, prompt_logprobs=0, start=10))
    assert [c.num_tokens for c in world.step()] == [9 + MAX_PROMPT_LOGPROB_ROWS]
    world.run()


def test_continuations_of_one_prompt_that_come_together_compute_it_once():
    world = World(num_blocks=200)
    for i in range(4):
        tokens = [*range(40), 100 + i, 110 + i]
        world.add(request(i, tokens, 0, prompt_logprobs=0, start=40))
    world.run()
    assert world.num_computed == 42 + 3 * 6  # the token that predicts the first is in block 10


def test_what_was_released_last_outlives_what_was_released_first():
    world = World(num_blocks=6)
    world.add(request("a", range(9), 1))
    world.run()
    world.add(request("b", range(100, 109), 1))
    world.run()
    world.add(request("c", range(200, 209), 1))  # takes the free blocks and the oldest cached ones
    world.run()
    before = world.num_computed
    world.add(request("again", range(100, 109), 1))
    world.run()
    assert world.num_computed - before == 1


def test_a_request_that_becomes_long_is_computed_again_once_and_was_not_preempted():
    world = World(long_rope_from=12)
    one = request("a", range(100, 110), 10)
    world.add(one)
    world.run()
    assert (world.num_voided, one.num_preemptions, one.num_generated) == (1, 0, 10)
    assert world.num_computed == 12 + 19  # the last token is never computed


def test_a_request_whose_last_token_would_make_it_long_just_finishes():
    world = World(long_rope_from=12)
    world.add(request("a", range(12), 1))
    world.run()
    assert world.num_computed == 12 and world.num_voided == 0


def test_a_long_prompt_is_long_from_its_first_chunk():
    world = World(long_rope_from=12, max_step=8)
    world.add(request("a", range(30), 3))
    world.run()
    assert world.num_computed == 32 and world.num_voided == 0


def test_long_requests_and_others_share_no_blocks_but_each_their_own():
    world = World(long_rope_from=12)
    computed = []
    for length in (12, 20, 20, 12):
        before = world.num_computed
        world.add(request(length, range(length), 1))
        world.run()
        computed.append(world.num_computed - before)
    assert computed == [12, 20, 4, 4]


def test_a_long_prompt_does_not_wait_for_a_short_one_that_begins_alike():
    world = World(long_rope_from=40, max_step=24)
    world.add(request("leader", range(40), 1))
    world.add(request("long", range(41), 1))
    world.add(request("waits", range(41), 1))
    assert [c.request.id for c in world.step()] == ["leader"]
    assert [c.request.id for c in world.step()] == ["leader", "long"]
    world.run()
    assert world.num_computed == 40 + 41 + 1


def test_a_request_that_becomes_long_is_the_next_to_start():
    world = World(long_rope_from=4, max_running=1)
    world.add(request("long", [1] * 4, 9))
    world.add(request("later", [2], 1))
    assert [[c.request.id for c in world.step()] for _ in range(2)] == [["long"], ["long"]]
    assert world.num_voided == 1
    world.run()


def test_requests_that_become_long_together_compute_what_they_share_once():
    world = World(long_rope_from=20, max_step=64)
    world.add(request("warms the cache", range(17), 1))
    world.run()
    for i in range(4):
        world.add(request(i, [*range(16), 50 + i, 60, 61], 6))
    world.step()
    world.step()
    assert world.num_voided == 4
    before = world.num_computed
    world.step()
    world.step()
    assert (
        world.num_computed - before == 21 + 3 * 5 + 1
    )  # one leads, and decodes when the others follow
    world.run()


class Collision:
    """A hash function under which everything is the same."""

    def __init__(self, data):
        self.data = data

    def digest(self):
        return bytes(32)


def collide(world):
    for i, salt in enumerate([b"", b"tenant", b""]):
        for tokens in (range(12), range(100, 112), [*range(4), *range(50, 58)], [7] * 12):
            world.add(request((i, *tokens), tokens, 3, salt=salt))
    world.run()


def test_hits_that_are_verified_alias_nothing_though_all_digests_collide(monkeypatch):
    monkeypatch.setattr(prefix, "sha256", Collision)
    with pytest.raises(AssertionError, match=r"another's block|shared block"):
        collide(World())
    world = World(verify_hits=True)
    collide(world)
    before = world.num_computed
    world.add(request("again", range(12), 1))
    world.run()
    assert world.num_computed - before == 4  # a prefix that is the same is still found
