"""The replay gives the bits of the loop that calls op by op, whatever the model, the threads and the steps."""

from dataclasses import replace

import numpy as np
import pytest

from tests.architectures import MODELS
from tests.step_driver import make_driver, nobody_sparse
from tests.tiny_models import make_checkpoint
from vivace.engine import core
from vivace.engine.config import CacheConfig, Config, CpuConfig, SchedulerConfig, SparseConfig
from vivace.engine.events import EngineRequest, Pooling, Sampling, Sparse
from vivace.kernels import backend
from vivace.kernels.backend import Backend
from vivace.kernels.buffer import DType

NAMES = ("qwen3", "gemma2", "gpt-oss", "olmoe", "qwen2-moe-dense-layers", "phi3-longrope")


class Both:
    """The loop on one thread and the replay on several, side by side: every step must be the same in all it leaves."""

    def __init__(self, loop, replay):
        assert loop.ops.recorder is None and replay.ops.recorder is not None
        self.loop, self.replay = loop, replay
        self.ops = loop.ops
        self.num_steps = 0

    def step(self, inputs):
        num_rows = len(inputs["rows"])
        for num_logits in (num_rows, num_rows // 2, 0, num_rows):
            poison(self.replay)
            want = self.loop.step(inputs, num_logits)
            got = self.replay.step(inputs, num_logits)
            for one, other in zip(want, got, strict=True):
                assert one.shape == other.shape and np.array_equal(one, other)
        for name, cache in self.loop.caches.items():
            assert np.array_equal(cache, self.replay.caches[name])
        self.num_steps += 1
        return want


def poison(runner):
    """What is left of other steps must not matter."""
    for slot in runner._arena:
        slot[:] = -1 if slot.dtype != np.float32 else np.nan


def loop_ops(threads=1):
    return replace(backend.load(Backend.CPU, threads=threads), recorder=None)


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory):
    kind, overrides = MODELS[request.param]
    return make_checkpoint(tmp_path_factory.mktemp(request.param), kind, **overrides)


@pytest.fixture(params=[1, 2, 4], ids=lambda threads: f"{threads} threads")
def driver(request, checkpoint):
    found, replayed = (
        make_driver(checkpoint, ops, num_blocks=64, max_tokens=128)
        for ops in (loop_ops(), backend.load(Backend.CPU, threads=request.param))
    )
    found.runner = Both(found.runner, replayed.runner)
    return found


def test_steps_of_all_sizes_back_and_forth(driver):
    first, second, third = (driver.add(range(3 + i, 203 + i), 200) for i in range(3))
    driver.step([(first, 64)])
    driver.step([(first, 1)])
    driver.step([(first, 1), (second, 7)], rows="last")
    driver.step([(second, 64), (first, 1), (third, 1)])
    driver.step([(first, 1), (second, 1), (third, 1)])
    driver.step([(third, 64)], rows="last")
    driver.step([(first, 1), (second, 1), (third, 1)])
    driver.step([(third, 7)])
    driver.step([(first, 1)])
    assert driver.runner.num_steps == 9


def test_greedy_tokens_over_growing_contexts(driver):
    assert [len(one) for one in driver.greedy([range(3, 20), range(5, 9)], 40)] == [40, 40]
    assert driver.runner.num_steps == 40


def test_sizes_of_an_engine_of_one_token_a_step(checkpoint):
    """Where no size can be more than one."""
    loop, replayed = (
        make_driver(checkpoint, ops, num_blocks=8, max_tokens=1)
        for ops in (loop_ops(), backend.load(Backend.CPU))
    )
    loop.runner = Both(loop.runner, replayed.runner)
    assert [len(one) for one in loop.greedy([[5]], 5)] == [5]


REQUESTS = (
    EngineRequest(
        "greedy", tuple(range(3, 20)), Sampling(0.0, 0, 1.0, 0.0, 0, 20, 0, (), None, None)
    ),
    EngineRequest("drawn", tuple(range(9, 70)), Sampling(0.9, 40, 0.95, 0.01, 7, 30, 0, (), 3, 2)),
    EngineRequest(
        "penalized",
        tuple(range(5, 12)),
        replace(
            Sampling(0.7, 0, 1.0, 0.0, 1, 25, 0, (), None, None),
            repetition_penalty=1.3,
            presence_penalty=0.5,
            logit_bias=((9, 2.0), (11, -4.0)),
        ),
    ),
    EngineRequest("scored", tuple(range(3, 50)), Sampling(0.0, 0, 1.0, 0.0, 0, 0, 0, (), None, 4)),
    EngineRequest(
        "sparse",
        tuple(range(3, 203)),
        Sampling(0.0, 0, 1.0, 0.0, 0, 30, 0, (), 1, None, sparse=Sparse(128, 0, 1)),
    ),
    EngineRequest(
        "embedded",
        tuple(range(7, 60)),
        Sampling(0.0, 0, 1.0, 0.0, 0, 0, 0, (), None, None),
        pooling=Pooling.MEAN,
    ),
)


def kept(event):
    """What is told of sparse decode."""
    usage = event.usage
    return usage and (usage.sparse_tokens, usage.kept_mass, usage.num_measured)


def events_of(config):
    """Every event of some requests that run together, without its times."""
    engine = core.load(config, lambda done, total: None)
    for request in REQUESTS:
        engine.add(request, 0.0)
    events = []
    while engine.has_work:
        events += engine.step(0.0)
    return [
        (e.request_id, e.token_ids, e.logprobs, e.prompt_logprobs, e.embedding, kept(e), e.finish)
        for e in events
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_engine_samples_scores_and_embeds_alike(tiny_qwen3, monkeypatch, threads):
    config = Config(
        model=tiny_qwen3,
        scheduler=SchedulerConfig(max_step_tokens=32, max_running=4),
        cache=CacheConfig(memory_bytes=1 << 22),
        cpu=CpuConfig(threads=threads),
        sparse=SparseConfig(min_kept_mass=0, measure_every=8),
    )
    replayed = events_of(config)
    plain = loop_ops(threads)
    monkeypatch.setattr(backend, "load", lambda *_args, **_kwargs: plain)
    assert events_of(config) == replayed
    ends = {name: (embedding, kept) for name, *_, embedding, kept, end in replayed if end}
    assert set(ends) == {request.request_id for request in REQUESTS} and ends["embedded"][0]
    num_sparse, mass, num_measured = ends["sparse"][1]
    assert num_sparse == 29 and 0 < mass < 1 and num_measured == 4


def test_the_contracts_of_all_ops_are_checked_when_the_model_is_loaded(tiny_qwen3):
    ops = backend.load(Backend.CPU)

    def refuse(*_args, **_attrs):
        raise ValueError("does not fit")

    with pytest.raises(ValueError, match="does not fit"):
        make_driver(tiny_qwen3, replace(ops, gated=refuse))


def test_other_ops_of_the_step_run_after_the_model(tiny_qwen3):
    ops = backend.load(Backend.CPU)
    driver = make_driver(tiny_qwen3, ops)
    doubled = ops.memory.empty((3 * 260,), DType.FP32)

    def double(logits):
        ops.add(ops.memory.view(doubled, logits.shape), logits, logits)

    step = {
        "tokens": np.arange(3, 6, dtype=np.int32),
        "positions": np.arange(3, dtype=np.int32),
        "slots": np.arange(3, dtype=np.int32),
        "block_tables": np.zeros((1, 1), np.int32),
        "query_starts": np.array([0, 3], np.int32),
        "context_lens": np.array([3], np.int32),
        "rows": np.arange(3, dtype=np.int32),
    } | nobody_sparse(1)
    logits, _ = driver.runner.step(step, then=double)
    assert np.array_equal(doubled.reshape(3, 260), 2 * logits) and np.abs(logits).max() > 0
