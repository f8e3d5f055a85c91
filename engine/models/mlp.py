"""Emits the gated MLP."""

from vivace.engine.models.builder import Builder
from vivace.engine.models.program import Value
from vivace.engine.models.spec import MlpSpec


def emit_mlp(b: Builder, at: str, x_TM: Value, spec: MlpSpec) -> Value:
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""
    (T, M), F = x_TM.shape, spec.hidden_size
    assert isinstance(M, int)
    gate_up_T2F = b.linear(x_TM, b.weight(f"{at}.gate_up", 2 * F, M, parts=(F, F)))
    act_TF = b.activation("gated", T, F)
    b.call("gated", (act_TF,), (gate_up_T2F,))
    return b.linear(act_TF, b.weight(f"{at}.down", M, F))
