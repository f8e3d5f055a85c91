"""The gated activation of an MLP: out = act(gate) * up, gate and up side by side in a row. arXiv:2002.05202.

silu: x * sigmoid(x). gelu: x * (1 + erf(x / sqrt 2)) / 2. gelu_tanh: its tanh approximation, arXiv:1606.08415.
clamped_swiglu (GPT-OSS): g = min(gate, limit), u = clamp(up, -limit, limit), out = g * sigmoid(alpha * g) * (u + 1);
`alpha` and `limit` matter there alone.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out: Buffer,  # fp32 [..., F], out; one leading dimension or more
        gate_up: Buffer,  # fp32 [..., 2F], gate first
        *,
        activation: str = "silu",  # one of ACTIVATIONS
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None: ...


def check(
    out: Buffer,
    gate_up: Buffer,
    *,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    if len(out.shape) < 2:
        raise ValueError(f"out must have at least two dimensions, got {list(out.shape)}")
    *leading, F = out.shape
    expect("gate_up", gate_up, *leading, 2 * F)
    expect_dtype("out", out, "float32")
    expect_dtype("gate_up", gate_up, "float32")
    check_activation(activation, limit)


def check_activation(activation: str, limit: float) -> None:
    """Raise ValueError unless there is such an activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
