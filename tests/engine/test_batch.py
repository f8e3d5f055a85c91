"""Chunks become the arrays that the program's inputs name."""

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tests.engine.fake_cache import BLOCK, World
from tests.engine.fake_cache import request as fake_request
from vivace.engine import batch as engine_batch
from vivace.engine.events import Pooling, Sampling
from vivace.engine.request import Request
from vivace.engine.scheduler import Chunk, Step

Batcher = partial(engine_batch.Batcher, vocab_size=100)


def build(batcher, *chunks, decoding=()):
    return batcher.build(Step(tuple(decoding), chunks))


def request(slot, tokens, blocks, *, num_computed=0, num_prompt=None, pooling=None, **sampling):
    fields = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.75,
        "min_p": 0.25,
        "seed": 2**64 - 1,
        "max_tokens": 9,
        "min_tokens": 0,
        "stop_token_ids": (),
        "logprobs": None,
        "prompt_logprobs": None,
    }
    made = Request(
        f"r{slot}",
        list(tokens),
        len(tokens) if num_prompt is None else num_prompt,
        Sampling(**(fields | sampling)),
        arrival=0.0,
        num_computed=num_computed,
        blocks=list(blocks),
        slot=slot,
        pooling=pooling,
    )
    if made.sampling.prompt_logprobs is not None:
        made.prompt_logprobs.append(None)
    return made


def test_a_decode_row_and_a_chunk_of_a_prompt_in_one_batch():
    decode = request(2, range(10, 16), [7, 3], num_computed=5, num_prompt=4)
    prefill = request(0, range(30, 40), [1, 9, 5], num_computed=3)
    batch = build(Batcher(4, 8, BLOCK), Chunk(prefill, 4), decoding=[decode])
    inputs = batch.inputs
    assert inputs["tokens"].tolist() == [15, 33, 34, 35, 36]
    assert inputs["positions"].tolist() == [5, 3, 4, 5, 6]
    assert inputs["slots"].tolist() == [3 * 4 + 1, 1 * 4 + 3, 9 * 4, 9 * 4 + 1, 9 * 4 + 2]
    assert inputs["query_starts"].tolist() == [0, 1, 5]
    assert inputs["context_lens"].tolist() == [6, 7]
    assert inputs["block_tables"][0].tolist() == [7, 3]
    assert inputs["block_tables"][1].tolist() == [1, 9]
    assert inputs["rows"].tolist() == [0]  # the prompt is not at its end
    assert batch.sampled == [decode]
    assert all(array.dtype == np.int32 for array in inputs.values())
    assert all(array.flags.c_contiguous for array in inputs.values())


def test_the_tables_follow_a_request_that_grows_and_a_slot_that_changes_hands():
    batcher = Batcher(1, 8, BLOCK)
    first = request(0, range(4), [5])
    build(batcher, Chunk(first, 4))
    first.num_computed = 4
    first.tokens.append(9)
    first.blocks.append(2)
    grown = build(batcher, decoding=[first])
    assert grown.inputs["block_tables"].tolist() == [[5, 2]]
    second = request(0, range(3), [6], seed=11, temperature=0.0)
    batch = build(batcher, Chunk(second, 3))
    assert batch.inputs["block_tables"].tolist() == [[6]]
    assert batch.sampling.temperature_R.tolist() == [0.0]
    assert batch.sampling.seeds_R.tolist() == [11]


def test_sampling_rows_carry_what_the_request_asked_and_where_the_token_will_stand():
    one = request(1, range(6), [0, 1])
    rows = build(Batcher(2, 4, BLOCK), Chunk(one, 6)).sampling
    assert rows.temperature_R.tolist() == [0.5]
    assert (rows.top_k_R.tolist(), rows.top_p_R.tolist(), rows.min_p_R.tolist()) == (
        [3],
        [0.75],
        [0.25],
    )
    assert rows.seeds_R.view(np.uint64).tolist() == [2**64 - 1]
    assert rows.positions_R.tolist() == [6]


def test_stop_tokens_are_forbidden_until_min_tokens_are_there():
    early = request(
        0, range(5), [0, 1], num_prompt=4, num_computed=4, min_tokens=2, stop_token_ids=(8, 9)
    )
    late = request(
        1, range(6), [2, 3], num_prompt=4, num_computed=5, min_tokens=2, stop_token_ids=(8, 9)
    )
    rows = build(Batcher(2, 4, BLOCK), decoding=[late, early]).sampling.adjustments
    assert rows.bias_starts.tolist() == [0, 0, 2]
    assert rows.bias_ids.tolist() == [8, 9]
    assert np.isneginf(rows.bias_values).all()


def test_rows_of_prompt_logprobs_follow_the_rows_that_sample():
    other = request(1, range(4), [4], num_computed=3, num_prompt=2, logprobs=2)
    asks = request(0, range(20, 26), [0, 1], prompt_logprobs=5)
    batcher = Batcher(2, 4, BLOCK)
    batch = build(batcher, Chunk(asks, 4), Chunk(other, 1))
    assert batch.inputs["rows"].tolist() == [4, 0, 1, 2, 3]
    assert [(r.request, r.first_position, r.count) for r in batch.prompt_rows] == [(asks, 1, 4)]
    assert (batch.logprob_rows.tolist(), batch.num_logprobs) == ([0, 1, 2, 3, 4], 5)
    assert batch.sampling.temperature_R.tolist() == [0.5]  # nothing is drawn of the prompt's
    asks.num_computed = 4
    asks.prompt_logprobs += [None] * 4
    batch = build(batcher, Chunk(asks, 2))
    assert batch.inputs["rows"].tolist() == [
        1,
        0,
    ]  # the last row samples, the one before predicts token 5
    assert [(r.first_position, r.count) for r in batch.prompt_rows] == [(5, 1)]


def test_prompt_rows_that_are_recorded_already_are_not_asked_for_again():
    again = request(0, range(8), [0, 1], prompt_logprobs=0)
    again.prompt_logprobs += [None] * 4  # tokens 1..4, before a preemption
    batch = build(Batcher(1, 4, BLOCK), Chunk(again, 6))
    assert [(r.first_position, r.count) for r in batch.prompt_rows] == [(5, 2)]
    assert batch.inputs["rows"].tolist() == [4, 5]


def test_rows_that_are_only_pooled_come_last_and_have_no_logits():
    decodes = request(0, range(6), [0, 1], num_computed=5, num_prompt=4)
    scored = request(1, range(5), [2, 3], prompt_logprobs=0, max_tokens=0)
    mean = request(2, range(8), [4, 5], num_computed=2, max_tokens=0, pooling=Pooling.MEAN)
    last = request(3, range(4), [6], max_tokens=0, pooling=Pooling.LAST)
    chunks = Chunk(mean, 3), Chunk(last, 4), Chunk(scored, 5), Chunk(decodes, 1)
    batch = build(Batcher(4, 4, BLOCK), *chunks)
    assert batch.inputs["rows"].tolist() == [12, 7, 8, 9, 10, 0, 1, 2, 6]
    assert (batch.num_sampled, batch.num_rows) == (1, 5)
    assert [(r.request, r.first_position, r.rows) for r in batch.pooled_rows] == [
        (mean, 2, [5, 6, 7]),
        (last, 3, [8]),
    ]
    assert len(batch.sampling.seeds_R) == 1 and len(batch.sampling.adjustments.bias_starts) == 2
    assert batch.logprob_rows.tolist() == [1, 2, 3, 4]  # the one that decodes wants none


def test_a_step_of_pooled_rows_alone_and_one_of_none():
    mean = request(0, range(8), [0, 1], max_tokens=0, pooling=Pooling.MEAN)
    last = request(1, range(8), [2, 3], max_tokens=0, pooling=Pooling.LAST)
    batcher = Batcher(2, 4, BLOCK)
    pooled, none = build(batcher, Chunk(mean, 4)), build(batcher, Chunk(last, 7))
    assert pooled.inputs["rows"].tolist() == [0, 1, 2, 3]
    assert none.inputs["rows"].tolist() == [] and none.inputs["rows"].dtype == np.int32
    for batch in (pooled, none):
        assert (batch.num_rows, len(batch.logprob_rows), batch.sampled) == (0, 0, [])
    assert none.pooled_rows == []


def test_a_row_that_is_pooled_and_predicts_a_wanted_token_is_there_once():
    both = request(0, range(6), [0, 1], max_tokens=0, prompt_logprobs=0, pooling=Pooling.MEAN)
    both.prompt_logprobs += [None, None]  # tokens 1 and 2, before a preemption
    batch = build(Batcher(1, 4, BLOCK), Chunk(both, 6))
    assert batch.inputs["rows"].tolist() == [2, 3, 4, 0, 1, 5]
    assert batch.num_rows == 3
    assert [r.rows for r in batch.pooled_rows] == [[3, 4, 0, 1, 2, 5]]


def test_each_token_says_whether_its_request_is_long():
    """By all the tokens that are known of it, not by those that are computed."""
    prefill = request(0, range(20), range(5), num_computed=4)
    at_the_limit = request(1, range(12), range(5, 8), num_computed=11)
    beyond = request(2, range(13), range(8, 12), num_computed=12)
    chunks = [Chunk(prefill, 3), Chunk(at_the_limit, 1), Chunk(beyond, 1)]
    variants_T = build(Batcher(3, 8, BLOCK, long_rope_from=12), *chunks).inputs["rope_variants"]
    assert variants_T.tolist() == [1, 1, 1, 0, 1]
    assert variants_T.dtype == np.int32 and variants_T.flags.c_contiguous
    for chunk in chunks:
        chunk.request.num_tabled = 0
    assert "rope_variants" not in build(Batcher(3, 8, BLOCK), *chunks).inputs


def test_a_prefix_whose_first_blocks_are_gone_keeps_each_block_at_its_place():
    one = request(0, range(14), [0, 0, 7, 8], num_computed=12)
    one.num_released = 2
    inputs = build(Batcher(1, 8, BLOCK), Chunk(one, 2)).inputs
    assert inputs["block_tables"].tolist() == [[0, 0, 7, 8]]
    assert inputs["slots"].tolist() == [8 * 4, 8 * 4 + 1]
    assert inputs["positions"].tolist() == [12, 13]


def plain(step):
    """What the arrays of a step must say, chunk by chunk."""
    chunks = [*(Chunk(one, 1) for one in step.decoding), *step.chunks]
    owners = [(chunk.request, p) for chunk in chunks for p in range(chunk.end)[-chunk.num_tokens :]]
    sampled = [chunk.request for chunk in chunks if chunk.samples]
    starts = [sum(chunk.num_tokens for chunk in chunks[:i]) for i in range(len(chunks) + 1)]
    return {
        "tokens": [one.tokens[p] for one, p in owners],
        "positions": [p for _, p in owners],
        "slots": [one.blocks[p // BLOCK] * BLOCK + p % BLOCK for one, p in owners],
        "query_starts": starts,
        "context_lens": [chunk.end for chunk in chunks],
        "rows": [end - 1 for chunk, end in zip(chunks, starts[1:], strict=True) if chunk.samples],
        "rope_variants": [int(len(one.tokens) > 22) for one, _ in owners],
        "block_tables": [chunk.request.blocks[: -(-chunk.end // BLOCK)] for chunk in chunks],
        "sampled": sampled,
        "seeds_R": [one.sampling.seed for one in sampled],
        "positions_R": [len(one.tokens) for one in sampled],
        "num_logprobs": max(
            (one.sampling.logprobs for one in sampled if one.sampling.logprobs is not None),
            default=0,
        ),
        "logprob_rows": [i for i, one in enumerate(sampled) if one.sampling.logprobs is not None],
    }


@pytest.mark.parametrize("seed", range(8))
def test_what_is_kept_of_those_who_decode_is_what_would_be_copied_anew(seed):
    """Requests come, go, grow, are preempted and become long."""
    rng = random.Random(seed)
    world = World(num_blocks=14, max_running=6, long_rope_from=22, window=(None, 6)[seed % 2])
    batcher = Batcher(6, 12, BLOCK, long_rope_from=22)
    num_kept = 0
    last = None

    def check(step):
        nonlocal num_kept, last
        num_kept += step.decoding is last and len(last) > 0
        last = step.decoding
        batch = batcher.build(step)
        want = plain(step)
        for got, row in zip(batch.inputs["block_tables"], want.pop("block_tables"), strict=True):
            assert got[: len(row)].tolist() == row
        for name in ("seeds_R", "positions_R"):
            assert getattr(batch.sampling, name).tolist() == want.pop(name)
        assert list(batch.sampled) == want.pop("sampled")
        assert batch.num_logprobs == want.pop("num_logprobs")
        assert batch.logprob_rows.tolist() == want.pop("logprob_rows")
        assert {name: batch.inputs[name].tolist() for name in want} == want

    world.see_step = check
    requests = [
        fake_request(i, [rng.randint(0, 2) for _ in range(rng.randint(1, 20))], rng.randint(1, 25))
        for i in range(25)
    ]
    for i, one in enumerate(requests):
        one.sampling = replace(one.sampling, seed=i, logprobs=rng.choice([None, 0, 3]))
        world.add(one)
    world.run()
    assert num_kept > 5 and world.num_voided > 0
    assert seed % 2 or any(one.num_preemptions for one in requests)
