"""Requests that draw nothing: embeddings and logprobs of prompts, alone and among requests that decode."""

import asyncio
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from tests.architectures import MODELS
from tests.engine.engine_process import collect_request, run, running
from tests.step_driver import Oracle
from tests.tiny_models import make_checkpoint
from vivace.engine import core, pooling
from vivace.engine.batch import PooledRows
from vivace.engine.config import CacheConfig, Config, CpuConfig, SchedulerConfig
from vivace.engine.errors import InvalidRequest
from vivace.engine.events import EngineRequest, FinishReason, Pooling, Sampling
from vivace.engine.request import Request
from vivace.engine.runtimes.native import COMMAND
from vivace.kernels.backend import Backend

GREEDY = Sampling(0.0, 0, 1.0, 0.0, 0, 30, 0, (), 2, None)
PROMPT_ONLY = replace(GREEDY, max_tokens=0, logprobs=None)
KINDS = ("llama-3-rope", "gemma2", "qwen3-moe", "mixtral-window")  # Gemma2 scales embeddings
LENGTHS = (1, 16, 40, 300)
CONTEXT = 512


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    kind, fields = MODELS[request.param]
    return make_checkpoint(tmp_path_factory.mktemp(request.param), kind, **fields)


@cache  # one reading of a checkpoint serves both backends
def hidden_of(directory):
    oracle = Oracle(directory)
    return [oracle.hidden(prompt_of(length)) for length in LENGTHS]


def prompt_of(length, seed=0):
    return tuple(np.random.default_rng((seed, length)).integers(0, 256, length).tolist())


def make_engine(directory, *, backend=Backend.CPU, cache=None, **scheduler):
    config = Config(
        model=directory,
        backend=backend,
        scheduler=SchedulerConfig(**scheduler),
        cache=cache or CacheConfig(),
        cpu=CpuConfig(threads=1) if backend is Backend.CPU else CpuConfig(),
    )
    return core.load(config, lambda done, total: None)


def embedding_request(name, prompt, kind, **sampling):
    return EngineRequest(name, prompt, replace(PROMPT_ONLY, **sampling), pooling=kind)


def every_embedding():
    """One request of each length and pooling."""
    return [
        embedding_request(f"{length} {kind.value}", prompt_of(length), kind)
        for length in LENGTHS
        for kind in Pooling
    ]


def drain(engine):
    """Events by request, until nothing is left to do."""
    events = {}
    while engine.has_work:
        for event in engine.step(0.0):
            events.setdefault(event.request_id, []).append(event)
    assert engine.loads().num_blocks_used == 0
    return events


def run_all(engine, requests):
    for request in requests:
        engine.add(request, 0.0)
    return drain(engine)


def embeddings_of(events):
    return {name: one[-1].embedding for name, one in events.items()}


def essence(events):
    """What a generation gave, to the last bit."""
    return [(event.token_ids, event.logprobs, event.finish) for event in events]


@pytest.mark.parametrize(
    "backend", (Backend.CPU, Backend.REFERENCE), ids=lambda backend: backend.value
)
def test_embeddings_are_the_final_hidden_states_of_transformers(checkpoint, backend):
    got = embeddings_of(run_all(make_engine(checkpoint, backend=backend), every_embedding()))
    for length, hidden in zip(LENGTHS, hidden_of(checkpoint), strict=True):
        for kind, want in (("mean", hidden.astype(np.float64).mean(axis=0)), ("last", hidden[-1])):
            error = np.abs(np.array(got[f"{length} {kind}"]) - want).max()
            assert error <= 1e-4 * np.abs(want).max()


def test_the_chunk_size_changes_no_bit_of_an_embedding(checkpoint):
    found = []
    for chunk in (1, 7, 64, 300):
        engine = make_engine(checkpoint, max_step_tokens=chunk, max_running=min(chunk, 4))
        found.append(embeddings_of(run_all(engine, every_embedding())))
    assert all(one == found[0] for one in found)
    assert all(np.float32(value) == value for value in found[0]["300 mean"])


def test_requests_that_decode_and_prompts_that_draw_nothing_change_nothing_of_each_other(
    checkpoint,
):
    generations = [EngineRequest(str(i), prompt_of(9 + i), GREEDY) for i in range(3)]
    alone = make_engine(checkpoint)
    want = {r.request_id: essence(run_all(alone, [r])[r.request_id]) for r in generations}
    embeddings = embeddings_of(run_all(make_engine(checkpoint), every_embedding()))
    engine = make_engine(checkpoint, max_step_tokens=24, max_running=8)
    for request in generations:
        engine.add(request, 0.0)
    events = {request.request_id: [] for request in generations}
    for _ in range(3):  # they decode when the others come
        for event in engine.step(0.0):
            events[event.request_id].append(event)
    for request in every_embedding():
        engine.add(request, 0.0)
    for name, more in drain(engine).items():
        events[name] = events.get(name, []) + more
    assert {name: essence(events[name]) for name in want} == want
    assert {name: events[name][-1].embedding for name in embeddings} == embeddings


def test_a_prompt_that_draws_nothing_has_one_event_that_tells_all(tiny_qwen3):
    engine = make_engine(tiny_qwen3, max_step_tokens=16, max_running=4)
    engine.add(embedding_request("a", prompt_of(40), Pooling.MEAN), 1.0)
    events = [event for _ in range(3) for event in engine.step(2.0)]
    [event] = events
    assert (event.finish, event.token_ids, event.stop_token_id) == (FinishReason.LENGTH, (), None)
    usage = event.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (40, 0, 0)
    assert (usage.queue_s, usage.first_token_s) == (1.0, 0.0) and usage.total_s > 0
    loads = engine.loads()
    assert (loads.num_requests_finished, loads.num_tokens_generated) == (1, 0)
    assert (loads.num_prompt_tokens, loads.num_tokens_computed) == (40, 40)
    assert loads.num_blocks_used == 0 and not engine.has_work


def test_a_request_without_pooling_has_no_embedding(tiny_qwen3):
    engine = make_engine(tiny_qwen3)
    events = run_all(
        engine,
        [EngineRequest("a", prompt_of(9), PROMPT_ONLY), EngineRequest("b", prompt_of(9), GREEDY)],
    )
    assert [one.embedding for name in "ab" for one in events[name]] == [None] * (1 + 30)


def test_a_prompt_that_draws_nothing_may_fill_the_context(tiny_qwen3):
    engine = make_engine(tiny_qwen3)
    [event] = run_all(engine, [embedding_request("a", prompt_of(CONTEXT), Pooling.LAST)])["a"]
    assert len(event.embedding) == 64 and event.usage.prompt_tokens == CONTEXT
    with pytest.raises(InvalidRequest, match=f"context of {CONTEXT} tokens, got {CONTEXT + 1}"):
        engine.add(embedding_request("b", prompt_of(CONTEXT + 1), Pooling.LAST), 0.0)


def test_pooling_with_tokens_to_draw_is_refused(tiny_qwen3):
    engine = make_engine(tiny_qwen3)
    with pytest.raises(InvalidRequest, match="max_tokens must be 0 with pooling, got 5"):
        engine.add(embedding_request("a", (1, 2), Pooling.MEAN, max_tokens=5), 0.0)
    assert not engine.has_work


def test_a_mean_is_computed_whole_and_a_last_token_takes_what_is_cached(tiny_qwen3):
    engine = make_engine(tiny_qwen3)
    for kind, cached in ((Pooling.MEAN, 0), (Pooling.LAST, 32)):
        request = embedding_request("a", prompt_of(40), kind)
        [first] = run_all(make_engine(tiny_qwen3), [request])["a"]
        run_all(engine, [EngineRequest("warms the cache", prompt_of(40), GREEDY)])
        [again] = run_all(engine, [request])["a"]
        assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, cached)
        assert again.embedding == first.embedding


def test_embeddings_that_come_together_share_what_they_can(tiny_qwen3):
    """Those of last tokens wait for their prefix; means wait for nobody."""
    engine = make_engine(tiny_qwen3)
    for i in range(3):
        engine.add(embedding_request(f"last {i}", (*prompt_of(40), i), Pooling.LAST), 0.0)
        engine.add(embedding_request(f"mean {i}", (*prompt_of(40, seed=1), i), Pooling.MEAN), 0.0)
    first = {event.request_id: event for event in engine.step(0.0)}
    assert sorted(first) == ["last 0", "mean 0", "mean 1", "mean 2"]
    ends = first | {name: event for name, [event] in drain(engine).items()}
    cached = {name: event.usage.cached_tokens for name, event in ends.items()}
    assert [cached[f"last {i}"] for i in range(3)] == [0, 32, 32]
    assert [cached[f"mean {i}"] for i in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("kind", Pooling)
def test_preemption_changes_no_bit_of_an_embedding(tiny_qwen3, kind):
    """Three tokens a step: the prompt is preempted in its middle, again and again."""
    request = embedding_request("a", prompt_of(40), kind)
    want = embeddings_of(run_all(make_engine(tiny_qwen3), [request]))["a"]
    for sharing in (True, False):
        cache = CacheConfig(
            block_tokens=4, memory_bytes=13 * (4 * 512 + 256), prefix_sharing=sharing
        )
        engine = make_engine(tiny_qwen3, cache=cache, max_step_tokens=3, max_running=3)
        assert engine.loads().num_blocks == 13
        engine.add(EngineRequest("decodes", (1, 2, 3), GREEDY), 0.0)
        engine.step(0.0)
        engine.add(request, 0.0)
        [event] = drain(engine)["a"]
        assert event.usage.num_preemptions > 0
        assert event.embedding == want


@pytest.mark.parametrize("way", ["abort", "deadline"])
def test_an_embedding_that_ends_early_is_none_and_frees_its_blocks(tiny_qwen3, way):
    engine = make_engine(tiny_qwen3, max_step_tokens=16, max_running=4)
    request = embedding_request("a", prompt_of(40), Pooling.MEAN)
    engine.add(replace(request, deadline=5.0), 0.0)
    assert engine.step(0.0) == []
    if way == "abort":
        engine.abort("a", 0.5)
    [event] = engine.step(5.0 if way == "deadline" else 1.0)
    assert event.finish is FinishReason[way.upper()] and event.embedding is None
    assert event.usage.completion_tokens == 0
    assert engine.loads().num_blocks_used == 0 and not engine.has_work
    [again] = run_all(engine, [request])["a"]
    [fresh] = run_all(make_engine(tiny_qwen3), [request])["a"]
    assert again.embedding == fresh.embedding


def test_an_embedding_and_prompt_logprobs_come_together(tiny_qwen3):
    """Some rows are then of both."""
    prompt = prompt_of(150)
    for kind in Pooling:
        pooled = embedding_request("a", prompt, kind)
        scored = EngineRequest("a", prompt, replace(PROMPT_ONLY, prompt_logprobs=2))
        [want] = run_all(make_engine(tiny_qwen3), [pooled])["a"]
        [logprobs] = run_all(make_engine(tiny_qwen3), [scored])["a"]
        both = replace(pooled, sampling=scored.sampling)
        engine = make_engine(tiny_qwen3, max_step_tokens=64, max_running=4)
        [got] = run_all(engine, [both])["a"]
        assert got.embedding == want.embedding
        assert got.prompt_logprobs == logprobs.prompt_logprobs


@pytest.mark.parametrize("start", [1, 2, 16, 17, 39, 40, 41, 100])
def test_prompt_logprobs_from_a_position_on_are_the_tail_of_all(checkpoint, start):
    prompt = prompt_of(40)

    def ask(engine, **fields):
        sampling = replace(PROMPT_ONLY, prompt_logprobs=3, **fields)
        [event] = run_all(engine, [EngineRequest("a", prompt, sampling)])["a"]
        assert event.finish is FinishReason.LENGTH and event.token_ids == ()
        return event

    whole = ask(make_engine(checkpoint)).prompt_logprobs
    assert len(whole) == 40 and whole[0] is None and None not in whole[1:]
    assert [place.token_id for place in whole[1:]] == list(prompt[1:])
    engine = make_engine(checkpoint, max_step_tokens=24, max_running=4)
    for cached in (0, min(start - 1, 39) // 16 * 16):
        got = ask(engine, prompt_logprobs_start=start)
        assert got.prompt_logprobs == (None,) * min(start, 40) + whole[start:]
        assert got.usage.cached_tokens == cached


def test_prompt_logprobs_from_a_position_on_come_with_tokens_too(tiny_qwen3):
    prompt = prompt_of(40)
    sampling = replace(GREEDY, prompt_logprobs=1)
    want = run_all(make_engine(tiny_qwen3), [EngineRequest("a", prompt, sampling)])["a"]
    later = replace(sampling, prompt_logprobs_start=33)
    engine = make_engine(tiny_qwen3)
    for cached in (0, 32):
        got = run_all(engine, [EngineRequest("a", prompt, later)])["a"]
        assert essence(got) == essence(want)
        assert got[0].prompt_logprobs == (None,) * 33 + want[0].prompt_logprobs[33:]
        assert got[-1].usage.cached_tokens == cached


def test_hidden_states_are_added_one_by_one_in_order():
    """In fp64, of numbers where any other order, or any other cut, would show."""
    rng = np.random.default_rng(5)
    hidden_TM = (rng.standard_normal((60, 33)) * 10.0 ** rng.integers(-9, 30, (60, 1))).astype("f4")
    want_M = np.zeros(33)
    for row_M in hidden_TM.astype(np.float64):
        want_M = want_M + row_M
    assert not np.array_equal(hidden_TM[:30].sum(0, "f8") + hidden_TM[30:].sum(0, "f8"), want_M)
    for size in (1, 7, 30, 60):
        one = Request("a", list(range(60)), 60, PROMPT_ONLY, 0.0, pooling=Pooling.MEAN)
        for start in range(0, 60, size):
            count = min(size, 60 - start)
            rows = list(range(count - 1, -1, -1))  # where they lie says nothing of their order
            pooling.add_rows([PooledRows(one, start, rows)], hidden_TM[start : start + count][::-1])
        assert np.array_equal(one.hidden_sum_M, want_M)
        assert pooling.embedding(one) == tuple((want_M / 60).astype(np.float32).tolist())


def test_embeddings_and_logprobs_cross_the_process_boundary(tiny_qwen3):
    requests = [
        embedding_request("mean", prompt_of(40), Pooling.MEAN),
        embedding_request("last", prompt_of(40), Pooling.LAST, prompt_logprobs=2),
    ]
    want = run_all(make_engine(tiny_qwen3), requests)

    async def main():
        config = Config(model=tiny_qwen3, cpu=CpuConfig(threads=1))
        async with running(config, command=COMMAND) as engine:
            calls = [collect_request(engine, request) for request in requests]
            return await asyncio.gather(*calls)

    for request, [event] in zip(requests, run(main()), strict=True):
        [wanted] = want[request.request_id]
        assert event.embedding == wanted.embedding and len(event.embedding) == 64
        assert event.prompt_logprobs == wanted.prompt_logprobs
        assert (event.finish, event.token_ids) == (FinishReason.LENGTH, ())
