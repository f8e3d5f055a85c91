"""Whole generations on the Triton backend, interpreted: the reference's tokens, whatever happens to a request on its way."""

import pytest

from tests.architectures import MODELS
from tests.tiny_models import make_checkpoint
from vivace import LLM, SamplingParams
from vivace.engine import core
from vivace.engine.config import CacheConfig, Config, GpuConfig, SchedulerConfig, SparseConfig
from vivace.engine.errors import ConfigError
from vivace.engine.events import EngineRequest, Sampling
from vivace.engine.plan import Machine
from vivace.kernels import backend
from vivace.kernels.backend import Backend
from vivace.kernels.compilation import CompiledAfterReady

pytestmark = pytest.mark.triton

BLOCK_TOKENS = 4  # also the unit of selection, so that a context of 40 tokens is long
NUM_BLOCKS = 18  # fewer than the requests come to need: one of them is preempted
LONG, SHORT = list(range(3, 46)), [250, 7, 31, 7, 99, 2, 11]
SPARSE = {"budget_tokens": 8 * BLOCK_TOKENS, "min_context": 0, "layers_dense": [0]}
REQUESTS = (  # the first decodes sparsely; the last finds the prefix that it has in common with it
    (LONG, SamplingParams(max_tokens=9, temperature=0.7, seed=11, ignore_eos=True, sparse=SPARSE)),
    (
        SHORT,
        SamplingParams(
            max_tokens=12, temperature=0.9, top_k=30, top_p=0.9, seed=5, ignore_eos=True, logprobs=2
        ),
    ),
    (
        [*LONG[:21], 9, 9],
        SamplingParams(max_tokens=9, temperature=0.0, repetition_penalty=1.3, ignore_eos=True),
    ),
)
GREEDY = Sampling(0.0, 0, 1.0, 0.0, 0, 4, 0, (), None, None)
NAMES = ("llama-gqa-2", "qwen3-moe", "gemma2")


def load(directory, backend, memory_bytes):
    config = Config(
        model=directory,
        backend=backend,
        scheduler=SchedulerConfig(max_step_tokens=16, max_running=3),
        cache=CacheConfig(block_tokens=BLOCK_TOKENS, memory_bytes=memory_bytes),
        sparse=SparseConfig(min_kept_mass=0.0, measure_every=4),
    )
    return LLM(directory, config=config)


def generated(directory, backend):
    """What became of the requests in a cache that is too small for them, then of the first again."""
    roomy = load(directory, Backend.REFERENCE, 1 << 20).core.info
    llm = load(directory, backend, NUM_BLOCKS * roomy.kv_bytes // roomy.num_blocks)
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in REQUESTS]
    params = [one for _, one in REQUESTS]
    results = [*llm.generate(prompts, params), *llm.generate(prompts[0], params[0])]
    return [(result.outputs[0].token_ids, result.usage) for result in results]


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_are_the_reference_s(name, tmp_path):
    """In chunks, preempted, with prefix hits, one of them sparsely."""
    kind, overrides = MODELS[name]
    directory = make_checkpoint(tmp_path, kind, seed=3, **overrides)
    got, want = generated(directory, Backend.TRITON), generated(directory, Backend.REFERENCE)
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
    usages = [usage for _, usage in got]
    assert sum(usage.num_preemptions for usage in usages) > 0
    assert usages[2].cached_tokens == 20 and usages[3].cached_tokens == 40
    assert usages[0].sparse_tokens == 8 and 0 < usages[0].kept_mass < 1
    for (_, mine), (_, its) in zip(got, want, strict=True):
        assert mine.kept_mass == pytest.approx(its.kept_mass, abs=1e-4)
        assert mine.num_preemptions == its.num_preemptions


def test_without_a_gpu_or_the_interpreter_it_is_refused_in_words(tmp_path):
    directory = make_checkpoint(tmp_path / "m")
    with pytest.raises(ConfigError, match="device 'cuda' is no GPU that can be used"):
        LLM(directory, config=Config(model=directory, device="cuda"))


def test_an_engine_on_a_gpu_warms_up_then_refuses_to_compile_as_it_is_set(tmp_path, monkeypatch):
    """A GPU that is interpreted; what its ops are bound with is asked of the engine, what it compiles late is refused."""
    directory, warmed = make_checkpoint(tmp_path / "m"), []
    load_real = backend.load

    def load_ops(kind, *, device, cache_dir):
        assert (kind, device, cache_dir) == (Backend.TRITON, "cuda:1", tmp_path)
        return load_real(kind, device="cpu")

    gpu = GpuConfig(strict_jit=True, kernel_cache_dir=tmp_path)
    monkeypatch.setattr(core, "read_machine", lambda device: Machine(1, 1 << 30, is_gpu=True))
    monkeypatch.setattr(core, "warm_up", warmed.append)
    monkeypatch.setattr(backend, "load", load_ops)
    engine = core.load(Config(model=directory, device="cuda:1", gpu=gpu), lambda *of: None)
    info = engine.info
    assert (info.backend, info.device, info.block_tokens) == ("triton", "cuda:1", 64)
    assert info.kv_dtype == "fp32" and len(warmed) == 1
    engine.add(EngineRequest("a", (1, 2, 3), GREEDY), 0.0)
    with pytest.raises(CompiledAfterReady, match="a GPU would have to compile"):
        engine.step(0.0)
    assert engine.loads().num_compiled_after_ready == 1
