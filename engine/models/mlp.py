"""Emits the gated MLP."""

from vivace.engine.models.builder import Builder
from vivace.engine.models.program import Value
from vivace.engine.models.spec import MlpSpec


def emit_mlp(b: Builder, at: str, x_TM: Value, spec: MlpSpec) -> Value:
    """down(activation(gate(x)) * up(x)), gate and up in one matrix."""
    (T, M), F = x_TM.shape, spec.hidden_size
    assert isinstance(M, int)
    gate_up = b.weight(f"{at}.gate_up", 2 * F, M, parts=(F, F))
    down = b.weight(f"{at}.down", M, F)
    gate_up_bias = down_bias = None
    if spec.bias:
        gate_up_bias = b.weight(f"{at}.gate_up_bias", 2 * F, parts=(F, F))
        down_bias = b.weight(f"{at}.down_bias", M)
    gate_up_T2F = b.linear(x_TM, gate_up, gate_up_bias)
    act_TF = b.activation("gated", T, F)
    b.call("gated", (act_TF,), (gate_up_T2F,), (("activation", spec.activation.value),))
    return b.linear(act_TF, down, down_bias)
