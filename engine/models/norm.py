"""Emits RMSNorms: alone, and joined with the residual add before them."""

from vivace.engine.models.builder import Builder
from vivace.engine.models.program import Value
from vivace.engine.models.spec import NormSpec


def emit_rmsnorm(b: Builder, at: str, x_TM: Value, *, norm: NormSpec) -> Value:
    """RMSNorm of x with the weight `at`."""
    out_TM = b.activation("rmsnorm", *x_TM.shape)
    b.call("rmsnorm", (out_TM,), (x_TM, _weight(b, at, x_TM, norm=norm)), (("eps", norm.eps),))
    return out_TM


def emit_add_rmsnorm(
    b: Builder, at: str, x_TM: Value, residual_TM: Value, *, norm: NormSpec
) -> tuple[Value, Value]:
    """x + residual, and the RMSNorm of that sum with the weight `at`."""
    sum_TM = b.activation("sum", *x_TM.shape)
    out_TM = b.activation("add_rmsnorm", *x_TM.shape)
    weight_M = _weight(b, at, x_TM, norm=norm)
    b.call("add_rmsnorm", (sum_TM, out_TM), (x_TM, residual_TM, weight_M), (("eps", norm.eps),))
    return sum_TM, out_TM


def _weight(b: Builder, at: str, x_TM: Value, *, norm: NormSpec) -> Value:
    """The weight of a norm over the last dimension of x."""
    M = x_TM.shape[-1]
    assert isinstance(M, int)
    return b.weight(at, M, plus=norm.offset)
