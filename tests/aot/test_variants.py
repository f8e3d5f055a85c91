"""The kernels that ship: few, found by a dry run that misses none, and sound as machine code on every target."""

import random
from dataclasses import replace
from importlib import import_module

import pytest

from tests.engine.fake_engine import FakeCore, Settings
from vivace.engine.config import CacheConfig, KvDType, SchedulerConfig
from vivace.engine.core import EngineCore
from vivace.engine.events import EngineRequest, Pooling, Sampling, Sparse
from vivace.engine.gpu_kernels import check, compiled, listed, read_models, shipped
from vivace.engine.models.program import Symbol
from vivace.engine.scheduler import ContextRules
from vivace.engine.warm_up import step_inputs, warm_up
from vivace.kernels.backend import bind_triton
from vivace.kernels.gpu import ahead
from vivace.kernels.gpu.target import TARGETS

pytestmark = pytest.mark.aot
MAX_SHIPPED = 64  # a closed list: whoever needs more finds out which constexpr multiplies them
CACHE = CacheConfig(dtype=KvDType.BF16, block_tokens=64)


@pytest.mark.parametrize("target", ["sm_90", "sm_80", "sm_100", "gfx942"])  # the slow ones first
def test_every_shipped_variant_is_sound(target, tmp_path):
    judgement, num_compiled = compiled(read_models(None, CACHE), target, tmp_path)
    assert {str(variant): found for variant, found in judgement.items() if found} == {}
    assert num_compiled == len(judgement) <= MAX_SHIPPED


@pytest.mark.parametrize(("target", "products"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_every_entry_of_what_is_expected_is_of_some_variant(target, products):
    """Another would check nothing. Products of many rows use the tensor cores of each target."""
    known, meant = listed(read_models(None, CACHE), target), set()
    for op in {variant.op for variant in known}:
        expected = getattr(import_module(f"vivace.kernels.{op}.triton"), "EXPECT", {})
        for words, names in expected.get(target, {}).items():
            assert any(ahead.has_words(one, words) for one in known if one.op == op), (op, words)
            meant.update(names)
    assert meant >= {products, "16-byte loads"}


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_listed_is_little_and_told_apart(target):
    variants = listed(read_models(None, CACHE), target)
    assert 10 < len(variants) <= MAX_SHIPPED
    assert len(set(map(str, variants))) == len(variants)  # none differs in what is not shown


def sampling_of(rng):
    """Anything that a client may ask for."""
    return Sampling(
        temperature=rng.choice((0.0, 0.7)),
        top_k=rng.choice((0, 50)),
        top_p=rng.choice((1.0, 0.9)),
        min_p=rng.choice((0.0, 0.1)),
        seed=rng.randrange(1 << 64),
        max_tokens=rng.randrange(1, 20),
        min_tokens=0,
        stop_token_ids=(),
        logprobs=rng.choice((None, None, 0, 7)),
        prompt_logprobs=rng.choice((None, None, None, 3)),
        frequency_penalty=rng.choice((0.0, 0.5)),
        logit_bias=rng.choice(((), ((3, 1.0), (17, -1.0)))),
        sparse=rng.choice((None, Sparse(budget_tokens=128, min_context=0, layers_dense=0))),
    )


def engine_of(model, bound):
    """The engine that would serve on these ops."""
    limits = {"vocab_size": model.spec.vocab_size}
    limits["max_context_tokens"] = bound.plan.max_context_tokens
    info = replace(FakeCore(Settings()).info, **limits)
    return EngineCore(
        model.config, bound.plan, bound, context=ContextRules(), info=info, clock=lambda: 0.0
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # made-up masses: 0 of 0 rows
@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-30b-a3b"])
def test_traffic_meets_no_variant_that_the_dry_run_did_not(name):
    [model] = read_models(name, CACHE)
    small = replace(model.config.cache, memory_bytes=256 << 20)
    steps = SchedulerConfig(max_step_tokens=700, max_running=50)
    model = replace(model, config=replace(model.config, cache=small, scheduler=steps))
    with ahead.listing("sm_90") as launcher:
        bound = model.bind(bind_triton(launcher))
        warm_up(bound)
        known = set(launcher.watch.variants)
        core, rng = engine_of(model, bound), random.Random(3)
        for i in range(120):
            prompt = tuple(rng.randrange(1000) for _ in range(rng.choice((1, 5, 64, 300, 1100))))
            pooling = rng.choice((None, None, None, Pooling.MEAN))
            sampling = sampling_of(rng)
            if pooling:
                sampling = replace(sampling, max_tokens=0)
            core.add(EngineRequest(f"{i}", prompt, sampling, pooling=pooling), 0.0)
            core.step(0.0)
        while core.has_work:
            core.step(0.0)
        assert core.loads().num_requests_finished == 120
        assert core._sparse.num_tokens > 0 and core._sparse.num_measured > 0
        assert set(launcher.watch.variants) - known == set()


@pytest.mark.parametrize(("tokens", "running"), [(8192, 256), (700, 50), (130, 64)])
def test_no_step_needs_more_scratch_than_the_dry_run(tokens, running):
    """The fullest: all run, each with a chunk, or one with all that the others leave, in the longest context."""
    [model] = read_models("llama-3.2-1b", CACHE)
    steps = SchedulerConfig(max_step_tokens=tokens, max_running=running)
    model = replace(model, config=replace(model.config, scheduler=steps))
    with ahead.listing("sm_90") as launcher:
        bound = model.bind(bind_triton(launcher))
        warm_up(bound)
        launcher.watch.seal(strict=True)
        most, (each, rest) = bound.plan.most, divmod(tokens, running)
        for query_lens in (
            [each + 1] * rest + [each] * (running - rest),
            [1] * (running - 1) + [tokens - running + 1],
            [tokens],
        ):
            bound.runner.step(step_inputs(query_lens, most[Symbol.X], running))


def test_check_says_what_is_wrong(monkeypatch, capsys):
    [model] = read_models("llama-3.2-1b", CACHE)
    monkeypatch.setattr(ahead, "meant", lambda *of: ["UTMALDG"])
    assert check([model], "sm_90") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "add_rmsnorm._add_rmsnorm BLOCK=2048" in lines[0] or "no UTMALDG" in lines[0]
    assert "not as they must be" in lines[-1]


def test_the_shipped_models_are_those_of_the_documents():
    assert list(shipped()) == [
        "llama-3.2-1b",
        "llama-3.1-8b",
        "qwen3-0.6b",
        "qwen3-8b",
        "qwen3-30b-a3b",
    ]
