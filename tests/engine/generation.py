"""What tests of whole generations share: prompts, settings, and all of a result that must not change."""

import random

from vivace import SamplingParams
from vivace.engine.config import CacheConfig, Config, CpuConfig, SchedulerConfig
from vivace.kernels.backend import Backend

PROMPT_LENGTHS = (1, 5, 16, 17, 40, 64, 100)
MAX_TOKENS = 50
SAMPLED = SamplingParams(
    temperature=0.9,
    top_k=40,
    top_p=0.95,
    seed=7,
    max_tokens=MAX_TOKENS,
    ignore_eos=True,
    logprobs=3,
    prompt_logprobs=2,
)


def config(
    directory, *, threads=1, memory_bytes=None, sharing=True, backend=Backend.CPU, **scheduler
):
    return Config(
        model=directory,
        backend=backend,
        cpu=CpuConfig(threads=threads) if backend is Backend.CPU else CpuConfig(),
        scheduler=SchedulerConfig(**scheduler),
        cache=CacheConfig(memory_bytes=memory_bytes, prefix_sharing=sharing),
    )


def prompts_of(llm):
    rng = random.Random(1)
    vocab = llm.core.info.vocab_size
    return [
        {"prompt_token_ids": [rng.randrange(3, vocab) for _ in range(n)]} for n in PROMPT_LENGTHS
    ]


def essence(results):
    """All that must not change: tokens, text and every logprob to the last bit."""
    return [
        (
            result.outputs[0].token_ids,
            result.outputs[0].text,
            result.outputs[0].finish_reason,
            [
                {token: (one.logprob.hex(), one.rank) for token, one in place.items()}
                for place in (*result.outputs[0].logprobs, *result.prompt_logprobs)
                if place is not None
            ],
        )
        for result in results
    ]
