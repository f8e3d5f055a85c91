"""Whole generations on the Triton backend, interpreted: the reference's tokens, whatever happens to a request on its way."""

from functools import cache

import pytest

from tests.architectures import MODELS
from tests.tiny_models import make_checkpoint
from vivace import LLM, SamplingParams
from vivace.engine.config import CacheConfig, Config, GpuConfig, SchedulerConfig
from vivace.engine.errors import ConfigError
from vivace.kernels.backend import Backend

pytestmark = pytest.mark.triton

BLOCK_TOKENS = 4  # also the unit of selection, so that a context of 40 tokens is long
NUM_BLOCKS = 22  # fewer than the requests come to need: one of them is preempted
LONG, SHORT = list(range(3, 46)), [250, 7, 31, 7, 99, 2, 11]
PROMPTS = (LONG, SHORT, [*LONG[:21], 9, 9])
SAMPLING = (
    SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0.9, top_k=30, top_p=0.9, seed=5, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=9, temperature=0.0, repetition_penalty=1.3, ignore_eos=True),
)  # fmt: skip
SPARSE = {"budget_tokens": 8 * BLOCK_TOKENS, "min_context": 0, "layers_dense": [0]}
NAMES = ("llama-gqa-2", "qwen3-moe", "gemma2")


@pytest.fixture(scope="module", params=NAMES)
def directory(request, tmp_path_factory):
    kind, overrides = MODELS[request.param]
    return make_checkpoint(tmp_path_factory.mktemp(request.param), kind, seed=3, **overrides)


def load(directory, backend, **settings):
    config = Config(
        model=directory,
        backend=backend,
        scheduler=SchedulerConfig(max_step_tokens=16, max_running=3),
        cache=CacheConfig(block_tokens=BLOCK_TOKENS, **settings),
    )
    return LLM(directory, config=config)


@cache
def generated(directory, backend, is_sparse):
    """Three prompts in a cache that is too small for them, then the first again; and what became of the requests."""
    roomy = load(directory, Backend.REFERENCE, memory_bytes=1 << 20).core.info
    block_bytes = roomy.kv_bytes // roomy.num_blocks
    llm = load(directory, backend, memory_bytes=NUM_BLOCKS * block_bytes)
    prompts = [{"prompt_token_ids": one} for one in PROMPTS]
    params = list(SAMPLING)
    if is_sparse:
        params[0] = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, sparse=SPARSE)
    results = [*llm.generate(prompts, params), *llm.generate(prompts[0], params[0])]
    return [
        (result.outputs[0].token_ids, result.usage.num_preemptions, result.usage.cached_tokens,
         result.usage.sparse_tokens, result.usage.kept_mass)
        for result in results
    ]  # fmt: skip


@pytest.mark.parametrize("is_sparse", (False, True), ids=("dense", "sparse"))
def test_the_tokens_are_the_reference_s(directory, is_sparse):
    got = generated(directory, Backend.TRITON, is_sparse)
    want = generated(directory, Backend.REFERENCE, is_sparse)
    for (*mine, kept), (*its, its_kept) in zip(got, want, strict=True):
        assert mine == its and kept == pytest.approx(its_kept, abs=1e-4)
    assert sum(preemptions for _, preemptions, *_ in got) > 0
    assert got[-1][2] >= len(LONG) // BLOCK_TOKENS * BLOCK_TOKENS - BLOCK_TOKENS  # a prefix hit
    assert (got[-1][3] > 0) == is_sparse


def test_sparse_decode_changes_what_it_should(directory):
    """Else the test above compares dense with dense."""
    sparse = generated(directory, Backend.REFERENCE, True)
    assert 0 < sparse[-1][4] < 1


def test_without_a_gpu_or_the_interpreter_it_is_refused_in_words(tmp_path):
    directory = make_checkpoint(tmp_path / "m")
    with pytest.raises(ConfigError, match="device 'cuda' is no GPU that can be used"):
        LLM(directory, config=Config(model=directory, device="cuda"))


def test_settings_of_the_gpu_reach_the_launcher(tmp_path):
    directory = make_checkpoint(tmp_path / "m")
    config = Config(model=directory, backend=Backend.TRITON, gpu=GpuConfig(strict_jit=True))
    info = LLM(directory, config=config).core.info
    assert (info.backend, info.block_tokens, info.kv_dtype) == ("triton", 64, "fp32")
