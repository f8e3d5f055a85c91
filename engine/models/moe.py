"""Emits a mixture of experts: router, the chosen experts' MLPs, their weighted sum."""

from vivace.engine.models.builder import Builder
from vivace.engine.models.mlp import emit_mlp
from vivace.engine.models.program import Value
from vivace.engine.models.spec import MoeSpec
from vivace.kernels.buffer import DType


def emit_moe(b: Builder, layer: str, x_TM: Value, spec: MoeSpec) -> Value:
    """The experts' sum for each token, with that of the shared expert where there is one."""
    at = f"{layer}.moe"
    (T, M), F, E, K = x_TM.shape, spec.hidden_size, spec.num_experts, spec.top_k
    assert isinstance(M, int)
    router_bias = b.weight(f"{at}.router_bias", E) if spec.router_bias else None
    logits_TE = b.linear(x_TM, b.weight(f"{at}.router", E, M), router_bias)
    weights_TK = b.activation("moe_weights", T, K)
    experts_TK = b.activation("moe_experts", T, K, dtype=DType.INT32)
    b.call(
        "moe_route",
        (weights_TK, experts_TK),
        (logits_TE, b.counter(f"{at}.loads", E)),
        (("scoring", "softmax"), ("renormalize", spec.renormalize)),
    )
    gate_up = b.weight(f"{at}.gate_up", E, 2 * F, M, parts=(F, F))
    down = b.weight(f"{at}.down", E, M, F)
    gate_up_bias: tuple[Value, ...] = ()
    down_bias: tuple[Value, ...] = ()
    if spec.expert_bias:
        gate_up_bias = (b.weight(f"{at}.gate_up_bias", E, 2 * F, parts=(F, F)),)
        down_bias = (b.weight(f"{at}.down_bias", E, M),)
    gate_up_TKF = b.activation("expert_linear", T, K, 2 * F)
    b.call("expert_linear", (gate_up_TKF,), (x_TM, experts_TK, gate_up, *gate_up_bias))
    act_TKF = b.activation("gated", T, K, F)
    b.call(
        "gated",
        (act_TKF,),
        (gate_up_TKF,),
        (("activation", spec.activation.value), ("alpha", spec.alpha), ("limit", spec.limit)),
    )
    out_TKM = b.activation("expert_linear", T, K, M)
    b.call("expert_linear", (out_TKM,), (act_TKF, experts_TK, down, *down_bias))
    shared: tuple[Value, ...] = ()
    if spec.shared is not None:
        shared_TM = emit_mlp(b, f"{layer}.shared", x_TM, spec.shared)
        shared = (shared_TM, b.linear(x_TM, b.weight(f"{layer}.shared.gate", 1, M)))
    sum_TM = b.activation("moe_combine", T, M)
    b.call("moe_combine", (sum_TM,), (out_TKM, weights_TK, *shared))
    return sum_TM
