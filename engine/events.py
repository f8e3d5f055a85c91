"""What goes into an engine and what comes out of it: token ids, never text. The words of the `Engine` protocol.

Times are seconds; absolute ones are of `time.monotonic()`, which all processes of a machine share.
"""

from dataclasses import dataclass
from enum import Enum

import msgspec


class Pooling(Enum):
    """Which final hidden state stands for a prompt."""

    MEAN = "mean"  # over all tokens
    LAST = "last"  # of the last token


class FinishReason(Enum):
    """Why a request ended. The last two are never a normal result."""

    STOP = "stop"  # a stop token, or (above the engine) a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # its caller left, or asked for it
    DEADLINE = "deadline"  # its time ran out


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn and when to stop; every field set and in range (`sampling.resolve` made it)."""

    temperature: float  # 0: greedy
    top_k: int  # 0: all
    top_p: float
    min_p: float
    seed: int  # 0 .. 2**64 - 1
    max_tokens: (
        int  # 0: the prompt is computed and nothing drawn, for its logprobs or its embedding
    )
    min_tokens: int  # stop tokens are forbidden before this many
    stop_token_ids: tuple[int, ...]  # the checkpoint's end tokens included, unless ignored
    logprobs: int | None  # how many best tokens a step beside the chosen one; None: no logprobs
    prompt_logprobs: int | None
    prompt_logprobs_start: int = 1  # >= 1, the first token of the prompt whose logprobs are wanted
    repetition_penalty: float = 1.0  # 1: off
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    bad_token_ids: tuple[int, ...] = ()  # never drawn


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation, as an engine takes it. Valid: ids in the vocabulary, prompt shorter than the context."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    deadline: float | None = None  # absolute
    salt: bytes = b""  # requests share cached prefixes only with the same salt
    priority: int = 0  # higher starts first; first come, first served among equals
    pooling: Pooling | None = None  # set: its last event has the prompt's embedding


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-softmax of the raw logits at one place: of the token that stands there, and of the best."""

    token_id: int
    logprob: float
    rank: int  # 1: the best
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. Times count from the engine's receipt of it."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache when it was first scheduled
    completion_tokens: int
    queue_s: float  # until first scheduled
    first_token_s: float  # until its first token; 0 if it had none
    total_s: float
    num_preemptions: int


class TokenEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step did for one request. The last event of a request, and no other, has `finish` and `usage`.

    No dataclass: a step makes one for each token, and a frozen dataclass of this size takes six times as long to make.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token, where asked for
    prompt_logprobs: tuple[
        TokenLogprobs | None, ...
    ] = ()  # whole, on the first event; None before `prompt_logprobs_start`
    finish: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended it
    usage: Usage | None = None
    embedding: tuple[float, ...] | None = None  # on the last event, where `pooling` was set


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves; constant once it is ready."""

    architecture: str
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    dtype: str  # of most weights as they are kept
    weights: str  # how much is kept in which type, and where it came from
    backend: str
    threads: int
    block_tokens: int
    num_blocks: int
    kv_dtype: str
    kv_bytes: int
    max_running: int
    max_waiting: int
    load_s: float  # from start to ready
    isa: str | None = None  # instruction set of the ops; None: the backend has no choice


@dataclass(frozen=True, slots=True)
class Loads:
    """How busy an engine is right now."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_used: int = 0  # held by requests
    num_blocks_cached: int = 0  # free, and holding a prefix
    num_steps: int = 0
    num_tokens_computed: int = 0
    num_tokens_generated: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_requests_finished: int = 0
    num_requests_aborted: int = 0  # by abort (a stop string is one), hang-up or deadline
    cancel_to_free_s: float = 0.0  # the longest that an abort took to free its blocks
    # Of each layer with experts: tokens that chose each. Of a last layer, only tokens that go on.
    expert_loads: tuple[tuple[int, ...], ...] = ()
