"""The native engine, step by step: what ends a request, and what is left when it has ended."""

from dataclasses import replace

import numpy as np
import pytest

from tests.architectures import qwen3_moe
from tests.architectures.phi3 import LONGROPE
from tests.step_driver import make_driver
from tests.tiny_models import make_checkpoint
from vivace.engine import core
from vivace.engine.config import CacheConfig, Config, CpuConfig, SchedulerConfig
from vivace.engine.errors import InvalidRequest, Overloaded
from vivace.engine.events import EngineRequest, FinishReason, Sampling
from vivace.kernels.backend import Backend, load

GREEDY = Sampling(0.0, 0, 1.0, 0.0, 0, 50, 0, (), None, None)


@pytest.fixture
def engine(tiny_qwen3):
    """Prompts of 40 take five steps; two requests run at a time."""
    config = Config(
        model=tiny_qwen3,
        scheduler=SchedulerConfig(max_step_tokens=8, max_running=2, max_waiting=4),
        cpu=CpuConfig(threads=1),
    )
    return core.load(config, lambda done, total: None)


def ask(name, length=3, *, deadline=None):
    return EngineRequest(name, tuple(range(3, 3 + length)), GREEDY, deadline=deadline)


def at_every_stage(engine, *, deadline=None):
    """Three requests: one that decodes, one in the middle of its prompt, one in the queue."""
    engine.add(ask("decodes", deadline=deadline), 0.0)
    engine.step(0.0)
    engine.step(0.0)
    engine.add(ask("prefills", 40, deadline=deadline), 0.0)
    engine.step(0.0)
    engine.add(ask("queued", deadline=deadline), 0.0)
    engine.step(0.0)
    loads = engine.loads()
    assert (loads.num_running, loads.num_waiting) == (2, 1) and loads.num_blocks_used > 0


def test_an_abort_at_any_stage_frees_everything_within_one_step(engine):
    at_every_stage(engine)
    for name in ("decodes", "prefills", "queued"):
        assert engine.abort(name, 0.25)
    events = engine.step(1.0)
    assert {event.request_id: event.finish for event in events} == dict.fromkeys(
        ("decodes", "prefills", "queued"), FinishReason.ABORT
    )
    loads = engine.loads()
    assert (loads.num_blocks_used, loads.num_running, loads.num_waiting) == (0, 0, 0)
    assert loads.num_requests_aborted == 3 and not engine.has_work


def test_the_loads_have_the_longest_time_from_an_abort_to_free_blocks(engine):
    """A deadline is no abort, and a second abort of the same request is not counted from."""
    took = []
    for aborted, freed in ((1.0, 1.5), (3.0, 5.0), (7.0, 7.25)):
        engine.add(ask("late", deadline=freed), 0.0)
        engine.add(ask("a"), 0.0)
        engine.step(0.0)
        engine.abort("a", aborted)
        engine.abort("a", 0.0)
        engine.step(freed)
        took.append(engine.loads().cancel_to_free_s)
    assert took == [0.5, 2.0, 2.0] and engine.loads().num_requests_aborted == 6


def test_a_deadline_at_any_stage_frees_everything_within_one_step(engine):
    at_every_stage(engine, deadline=5.0)
    assert all(event.finish is None for event in engine.step(4.9))
    events = engine.step(5.0)
    assert {event.finish for event in events} == {FinishReason.DEADLINE} and len(events) == 3
    assert engine.loads().num_blocks_used == 0 and not engine.has_work


def test_an_aborted_request_ends_in_exactly_one_event(engine):
    engine.add(ask("a"), 0.0)
    engine.step(0.0)
    assert engine.abort("a", 0.0) and engine.abort("a", 0.0)
    assert [event.request_id for event in engine.step(0.0)] == ["a"]
    assert not engine.abort("a", 0.0)
    assert engine.step(0.0) == []


def test_abort_of_an_unknown_request_says_so(engine):
    assert not engine.abort("nobody", 0.0)
    assert not engine.has_work


def test_a_request_that_finishes_has_one_final_event_with_its_usage(engine):
    engine.add(ask("a", 11), 2.0)
    events = []
    while engine.has_work:
        events += engine.step(3.0)
    assert [event.finish for event in events[:-1]] == [None] * 49
    last = events[-1]
    assert last.finish is FinishReason.LENGTH and last.stop_token_id is None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (11, 50)
    assert last.usage.queue_s == 1.0
    assert 0 < last.usage.first_token_s <= last.usage.total_s
    assert all(event.usage is None for event in events[:-1])


def test_a_full_queue_refuses_and_loses_nobody(engine):
    for i in range(4):
        engine.add(ask(str(i)), 0.0)
    with pytest.raises(Overloaded):
        engine.add(ask("one too many"), 0.0)
    with pytest.raises(InvalidRequest):
        engine.add(ask("0"), 0.0)
    finished = []
    while engine.has_work:
        finished += [event.request_id for event in engine.step(0.0) if event.finish]
    assert sorted(finished) == ["0", "1", "2", "3"]


def test_the_loads_add_up(engine):
    engine.add(ask("a", 40), 0.0)
    while engine.has_work:
        engine.step(0.0)
    engine.add(ask("b", 40), 0.0)
    while engine.has_work:
        engine.step(0.0)
    loads = engine.loads()
    assert loads.num_tokens_generated == 100
    assert loads.num_tokens_computed == 40 + 49 + (40 - 32) + 49
    assert (loads.num_prompt_tokens, loads.num_cached_tokens) == (80, 32)
    assert loads.num_requests_finished == 2
    assert loads.num_blocks_cached == 5  # 89 computed tokens fill five blocks, the same for both


def test_progress_grows_while_it_works(engine):
    before = engine.progress()
    engine.add(ask("a"), 0.0)
    engine.step(0.0)
    assert engine.progress() > before


CONTEXTS = {  # transformers' `model_type` and the fields that matter here
    "window": ("mistral", {"sliding_window": 22}),
    "long rope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48},
    ),
    "both": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 48,
            "sliding_window": 21,
        },
    ),
}


@pytest.fixture(params=CONTEXTS)
def checkpoint(request, tmp_path_factory):
    kind, fields = CONTEXTS[request.param]
    return make_checkpoint(tmp_path_factory.mktemp("context"), kind, **fields)


def test_windows_and_long_rope_change_nothing_of_what_a_request_gets(checkpoint):
    """Short of blocks, in chunks, with prefix hits and preemption: the tokens of a cache that keeps everything."""
    config = Config(
        model=checkpoint,
        scheduler=SchedulerConfig(max_step_tokens=16, max_running=12),
        cache=CacheConfig(block_tokens=4, memory_bytes=32 * 4 * 512),
        cpu=CpuConfig(threads=1),
    )
    engine = core.load(config, lambda done, total: None)
    assert engine.loads().num_blocks == 32
    prompts = [range(3, 3 + length) for length in (3, 20, 40, 47, 48, 49, 70, 40)]
    prompts += [range(100 + i, 110 + i) for i in range(10)]
    tokens = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(EngineRequest(str(i), tuple(prompt), GREEDY), 0.0)
    while engine.has_work:
        for event in engine.step(0.0):
            tokens[int(event.request_id)] += event.token_ids
    loads = engine.loads()
    assert loads.num_blocks_used == 0
    assert loads.num_cached_tokens > 0 and loads.num_preemptions > 0
    driver = make_driver(checkpoint, load(Backend.CPU, threads=1))
    assert tokens == [driver.greedy([prompt], 50)[0] for prompt in prompts]


@pytest.mark.parametrize("backend", (Backend.CPU, Backend.REFERENCE))
def test_choices_of_experts_are_counted(tmp_path, backend):
    fields = qwen3_moe.TINY["qwen3-moe"]
    config = Config(
        model=make_checkpoint(tmp_path, "qwen3_moe", **fields),
        backend=backend,
        cache=CacheConfig(memory_bytes=1 << 20),
    )
    engine = core.load(config, lambda done, total: None)
    assert not np.any(engine.loads().expert_loads)
    for i in range(3):
        engine.add(EngineRequest(str(i), tuple(range(10 * i, 10 * i + 7 + i)), GREEDY), 0.0)
    while engine.has_work:
        engine.step(0.0)
    loads = engine.loads()
    first, last = np.array(loads.expert_loads)
    per_token = fields["num_experts_per_tok"]
    assert len(first) == fields["num_experts"]
    assert first.sum() == per_token * loads.num_tokens_computed
    assert last.sum() == per_token * loads.num_tokens_generated  # no other row goes on


def test_a_model_with_windows_gives_blocks_back_while_it_generates(tmp_path):
    config = Config(
        model=make_checkpoint(tmp_path, "mistral", sliding_window=10),
        cache=CacheConfig(block_tokens=4),
        cpu=CpuConfig(threads=1),
    )
    engine = core.load(config, lambda done, total: None)
    engine.add(ask("a"), 0.0)
    used = []
    while engine.has_work:
        engine.step(0.0)
        used.append(engine.loads().num_blocks_used)
    assert max(used) == 3  # that the last nine positions can lie in; all 52 take 13


def finished(engine, *requests):
    """Tokens, logprobs and prompt logprobs of each, by its id."""
    for one in requests:
        engine.add(one, 0.0)
    found = {one.request_id: ([], [], []) for one in requests}
    while engine.has_work:
        for event in engine.step(0.0):
            news = (event.token_ids, event.logprobs, event.prompt_logprobs)
            for have, new in zip(found[event.request_id], news, strict=True):
                have += new
    return found


def test_logprobs_are_computed_of_the_rows_that_want_them_and_are_what_they_are_alone(engine):
    rows = []
    run = engine._sampler._ops.logprobs

    def counted(chosen_R, ranks_R, top_ids_RK, *rest):
        rows.append(top_ids_RK.shape)
        run(chosen_R, ranks_R, top_ids_RK, *rest)

    engine._sampler._ops = replace(engine._sampler._ops, logprobs=counted)
    plain = ask("plain", 2)
    asks = replace(ask("asks", 3), sampling=replace(GREEDY, logprobs=2, max_tokens=5))
    of_prompt = replace(
        ask("of prompt", 4), sampling=replace(GREEDY, prompt_logprobs=1, max_tokens=5)
    )
    mixed = {**finished(engine, plain, asks), **finished(engine, replace(plain), of_prompt)}
    assert rows == [(1, 2)] * 5 + [(3, 1)]
    alone = {**finished(engine, asks), **finished(engine, of_prompt)}
    for name in ("asks", "of prompt"):
        assert mixed[name] == alone[name]
    assert len(mixed["asks"][1]) == 5 and len(mixed["of prompt"][2]) == 4


def test_prompt_logprobs_are_dropped_once_they_are_sent(engine):
    sampling = replace(GREEDY, prompt_logprobs=5)
    engine.add(replace(ask("a", 6), sampling=sampling), 0.0)
    [event] = engine.step(0.0)
    assert [place is None for place in event.prompt_logprobs] == [True] + [False] * 5
    assert engine._scheduler._requests["a"].prompt_logprobs == [None] * 6
