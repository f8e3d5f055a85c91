"""The prefix index and the pool, where the scheduler's tests do not reach."""

import pytest

from vivace.engine.blocks import BlockPool
from vivace.engine.prefix import PrefixIndex


def digests(tokens, *, key=b"key", salt=b"", size=4, is_long=False):
    found = []
    PrefixIndex(size, key).extend(found, tokens, salt, is_long=is_long)
    return found


def test_only_full_blocks_have_a_digest():
    assert [len(digests(range(n))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_a_digest_covers_all_tokens_before_the_block():
    assert digests([1, 2, 3, 4, 5, 6, 7, 8])[1] != digests([0, 2, 3, 4, 5, 6, 7, 8])[1]


@pytest.mark.parametrize("other", [{"key": b"another"}, {"salt": b"tenant"}])
def test_a_digest_covers_the_key_and_the_salt(other):
    assert set(digests(range(8))).isdisjoint(digests(range(8), **other))


def test_no_salt_makes_a_long_requests_digests_another_requests():
    salts = [b"", b"\0", b"\1", b"\1\1", b"long", b"tenant", b"\1tenant", b"tenant\1"]
    kinds = [(salt, is_long) for salt in salts for is_long in (False, True)]
    found = {
        digest for kind in kinds for digest in digests(range(8), salt=kind[0], is_long=kind[1])
    }
    assert len(found) == 2 * len(kinds)


def test_digests_can_be_extended_as_tokens_come():
    index, found = PrefixIndex(4, b"key"), []
    for n in range(13):
        index.extend(found, range(n), b"")
    assert found == digests(range(12))


def test_where_two_blocks_hold_the_same_prefix_the_first_stays():
    index = PrefixIndex(4, b"key")
    index.insert(b"d", 1)
    index.insert(b"d", 2)
    assert index.find(b"d") == 1 and 1 in index and 2 not in index
    index.forget(1)
    assert index.find(b"d") is None


def test_a_pool_that_is_too_small_says_no_and_changes_nothing():
    pool = BlockPool(3, PrefixIndex(4, b"key"))
    assert pool.take(4) is None
    assert pool.num_available == 3
    assert sorted(pool.take(3) or ()) == [0, 1, 2]


def test_cached_blocks_are_given_away_last_and_oldest_first():
    index = PrefixIndex(4, b"key")
    pool = BlockPool(3, index)
    first, second, third = pool.take(3)
    index.insert(b"1", first)
    index.insert(b"2", second)
    for block in (second, first, third):
        pool.release([block])
    assert pool.num_cached == 2
    assert pool.take(1) == [third]
    assert pool.take(1) == [second] and index.find(b"2") is None
    assert index.find(b"1") == first
    pool.share([first])
    assert pool.take(1) is None


def test_a_prefix_outlives_what_follows_it():
    index = PrefixIndex(4, b"key")
    pool = BlockPool(3, index)
    blocks = pool.take(3)
    for i, block in enumerate(blocks):
        index.insert(bytes([i]), block)
    pool.release(blocks)
    assert pool.take(2) == [blocks[2], blocks[1]]
    assert index.find(b"\0") == blocks[0]
