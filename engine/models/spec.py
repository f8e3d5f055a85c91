"""What a model is: its layers as data. `hf_config.read_spec` makes it from a checkpoint's config.json, `decoder.emit`
turns it into a program. Nothing here names an architecture.
"""

from dataclasses import dataclass
from enum import Enum


class Activation(Enum):
    """Between the gate's and the down projection of an MLP; `kernels.gated` has the formulas."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    CLAMPED_SWIGLU = "clamped_swiglu"


class QkNorm(Enum):
    """RMSNorm of q and k before the rotation."""

    NONE = "none"
    HEAD = "head"  # each head by itself
    ROW = "row"  # all heads of a token together


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All rotary frequencies divided by one number."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama-3's stretch of the low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN, arXiv:2309.00071: slow rotations are stretched, fast ones kept, those between mixed."""

    factor: float
    beta_fast: float  # rotations over the original context: as many or more are kept
    beta_slow: float  # as many or fewer are stretched
    truncate: bool  # whether the bounds are rounded to whole dimensions
    attention_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE, arXiv:2402.13753: one divisor for each frequency, and others past the original context."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float
    original_max_position: int


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of one kind of layer."""

    theta: float
    rotary_dim: int  # leading elements of a head that are rotated; 0: the layer knows no positions
    scaling: Scaling | None = None


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * (weight + offset)."""

    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Causal self-attention with grouped heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    scale: float
    norm: NormSpec  # of q and k
    qk_norm: QkNorm = QkNorm.NONE
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None  # positions that a token sees, its own included; None: all
    softcap: float | None = None  # scores become c * tanh(score / c)
    sinks: bool = False  # one more logit a head, without a value


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """down(activation(gate(x)) * up(x))."""

    hidden_size: int
    activation: Activation = Activation.SILU
    bias: bool = False


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A router's choice of `top_k` of the experts by softmax, each an MLP, and perhaps one that is always chosen."""

    num_experts: int
    top_k: int
    hidden_size: int  # of an expert
    renormalize: bool  # whether the weights of the chosen sum to 1
    activation: Activation = Activation.SILU
    router_bias: bool = False
    expert_bias: bool = False
    shared: MlpSpec | None = None  # its output goes through a sigmoid gate
    alpha: float = 1.702  # of CLAMPED_SWIGLU
    limit: float = 7.0  # of CLAMPED_SWIGLU


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: attention and MLP, each added to its own input."""

    attention: AttentionSpec
    mlp: MlpSpec | MoeSpec
    norms_before: bool = True  # the inputs of attention and MLP are normed
    norms_after: bool = False  # their outputs are, before they are added


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only model. `architecture` names the file that says what its tensors are called."""

    architecture: str
    vocab_size: int
    model_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    tied_embeddings: bool
    max_context_tokens: int
    embed_scale: float = 1.0
    final_softcap: float | None = None  # logits become c * tanh(logit / c)

    @property
    def window(self) -> int | None:
        """How far back any layer sees, in tokens; None if one sees everything."""
        windows = [layer.attention.window for layer in self.layers]
        return max((w for w in windows if w is not None), default=None) if all(windows) else None

    @property
    def long_rope_from(self) -> int | None:
        """Requests of more tokens than this are rotated by the long factors; None: there are none."""
        for layer in self.layers:
            scaling = layer.attention.rope.scaling
            if isinstance(scaling, LongRopeScaling):
                return scaling.original_max_position
        return None
