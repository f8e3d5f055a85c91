"""A mixture-of-experts layer of the shape of Qwen3-30B-A3B, from the router's logits to the sum of the experts' rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from tests.gpu.bars import figure, judged
from tests.gpu.machine import l2_bytes
from tests.gpu.results import Result
from tests.gpu.setting import TOLERANCE_BF16, Setting, meter_of, relative
from tests.gpu.timing import copies
from vivace.kernels.backend import Ops

Tensor = torch.Tensor
ROWS = (1, 8, 64, 512, 4096)
OF_PRODUCT = ("moe/512", "moe/4096")  # bounded by their arithmetic
MAX_SETS = 16  # of routing; at more rows one call reads more than the L2 anyway


@dataclass(frozen=True)
class Experts:
    """E experts, K of which a token takes; [E, 2F, M] and [E, M, F]."""

    gate_up: Tensor
    down: Tensor
    K: int

    @property
    def bytes_each(self) -> int:
        """Of one expert's matrices."""
        return sum(w[0].numel() * w.element_size() for w in (self.gate_up, self.down))


def experts(device: str, dtype: torch.dtype, *, is_tiny: bool) -> Experts:
    """Random ones."""
    E, K, M, F = (16, 2, 32, 16) if is_tiny else (128, 8, 2048, 768)
    make = partial(torch.randn, dtype=dtype, device=device)
    return Experts(make(E, 2 * F, M) * M**-0.5, make(E, M, F) * F**-0.5, K)


@dataclass(frozen=True)
class Layer:
    """Buffers of T tokens; what it reads of them stays where it is."""

    experts: Experts
    x_TM: Tensor
    logits_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor
    order_TK: Tensor
    tiles_TK3: Tensor
    hidden_TKF: Tensor
    y_TKM: Tensor
    out_TM: Tensor

    def run(self, ops: Ops) -> None:
        """Routing, both products, the sum."""
        E, _, _ = self.experts.gate_up.shape
        assigned = self.experts_TK, self.order_TK, self.tiles_TK3
        ops.moe_route(
            self.weights_TK, self.experts_TK, self.logits_TE, scoring="softmax", renormalize=True
        )
        ops.moe_assign(self.order_TK, self.tiles_TK3, self.experts_TK, num_experts=E)
        ops.expert_gated(
            self.hidden_TKF, self.x_TM, *assigned, self.experts.gate_up, activation="silu"
        )
        ops.expert_down(self.y_TKM, self.hidden_TKF, *assigned, self.experts.down)
        ops.moe_combine(self.out_TM, self.y_TKM, self.weights_TK)


def layer(made: Experts, x_TM: Tensor, logits_TE: Tensor) -> Layer:
    """With outputs that nobody has written."""
    _, M, F = made.down.shape
    T, K, device = len(x_TM), made.K, x_TM.device
    empty = partial(torch.empty, device=device)
    ints = partial(torch.empty, dtype=torch.int32, device=device)
    return Layer(
        made,
        x_TM,
        logits_TE,
        empty(T, K),
        ints(T, K),
        ints(T, K),
        ints(T, K, 3),
        empty(T, K, F),
        empty(T, K, M),
        empty(T, M),
    )


def routings(made: Experts, T: int, count: int) -> list[Tensor]:
    """Logits; of one token, such that calls in a row take other experts."""
    E, device = len(made.down), made.down.device
    logits = [torch.randn(T, E, device=device) for _ in range(count)]
    if T == 1:
        order = torch.randperm(E, device=device)
        for i, one in enumerate(logits):
            chosen = torch.arange(i * made.K, (i + 1) * made.K, device=device) % E
            one[0, order[chosen]] += 20
    return logits


def num_distinct(layers: list[Layer]) -> float:
    """Experts that a call reads, on average."""
    return sum(one.experts_TK.unique().numel() for one in layers) / len(layers)


def expected(made: Layer, t: int) -> Tensor:
    """fp32, of one token; what a bf16 product rounds is rounded here."""
    w, K = made.experts, made.experts.K
    dtype = w.down.dtype
    best = made.logits_TE[t].topk(K)
    out = torch.zeros_like(made.x_TM[t])
    for weight, e in zip(best.values.softmax(0), best.indices, strict=True):
        gate, up = (w.gate_up[e].float() @ made.x_TM[t].to(dtype).float()).chunk(2)
        hidden = (torch.nn.functional.silu(gate) * up).to(dtype).float()
        out += weight * (w.down[e].float() @ hidden)
    return out


def moe(setting: Setting, T: int) -> Iterator[Result]:
    """A step of T tokens."""
    made = experts(setting.device, torch.bfloat16, is_tiny=setting.is_tiny)
    name = f"moe/{T}"
    T = min(T, 40) if setting.is_tiny else T
    ops = setting.ops()
    per_call = min(T * made.K, len(made.down)) * made.bytes_each
    count = max(4, min(MAX_SETS, copies(per_call, l2_bytes(setting.device))))
    x = torch.randn(T, made.down.shape[1], device=setting.device)
    layers = [layer(made, x, logits) for logits in routings(made, T, count)]
    timing = meter_of(setting, ops).times({"": [partial(one.run, ops) for one in layers]})[""]
    error = max(
        relative(layers[0].out_TM[t], expected(layers[0], t)) for t in range(0, T, -(-T // 4))
    )
    num_bytes = num_distinct(layers) * made.bytes_each
    flops = T * made.K * 2 * made.bytes_each / made.down.element_size()
    work, of = (flops, "product") if name in OF_PRODUCT else (num_bytes, "copy")
    found = figure(name, timing, work=work, of=of)
    yield judged(found, setting.ceilings, error=error, tolerance=TOLERANCE_BF16)
