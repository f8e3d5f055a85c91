"""What a call of an op must at least read and compute, and how long that takes a machine with given peaks.

Projections and attention count what must come from memory: weights, and the keys and values of the context. All other ops
count all that they touch, which caches may hold: they can be above 100 % of the bandwidth.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from vivace.engine.models.program import Call, Kind, Sizes, Symbol, Value, sized, weight_bytes
from vivace.engine.runner import BYTES
from vivace.kernels.buffer import kv_head_bytes
from vivace.kernels.cpu.probe import Peaks

MATRICES = ("linear", "linear_int8", "linear_int4")
EXPERTS = ("expert_linear", "expert_linear_int8", "expert_linear_int4")
FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Work:
    """Of a call, or of a step. A multiply-add is two operations."""

    num_bytes: float = 0
    int8_ops: float = 0
    fp32_ops: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.num_bytes + other.num_bytes,
            self.int8_ops + other.int8_ops,
            self.fp32_ops + other.fp32_ops,
        )

    def bounds(self, peaks: Peaks) -> dict[str, float]:
        """Seconds that each of the machine's limits sets."""
        bounds = {"bandwidth": self.num_bytes / peaks.read, "fp32 peak": self.fp32_ops / peaks.fp32}
        if peaks.int8 is not None:
            bounds["int8 peak"] = self.int8_ops / peaks.int8
        return bounds


@dataclass(frozen=True, slots=True)
class Step:
    """A kind of step: its sizes, and what its queries see of the cache."""

    tokens: int
    requests: int
    context: float  # tokens of each request in the cache, at the end of the step
    visible: float  # tokens that a query sees, in the mean

    @property
    def sizes(self) -> Sizes:
        """Of the program's symbols; each request gives one row."""
        B = self.requests
        return {Symbol.T: self.tokens, Symbol.B: B, Symbol.B1: B + 1, Symbol.P: B, Symbol.R: B}


def work_of(call: Call, step: Step) -> Work:
    """Of one call."""
    if call.op in MATRICES + EXPERTS:
        return _product(call, step)
    if call.op == "attention":
        return _attention(call, step)
    if call.op in ("embed", "embed_int8"):
        table = call.ins[1]
        rows = step.tokens / sized(table.shape, {})[0]
        return Work(rows * weight_bytes(table) + _bytes([call.outs[0]], step))
    kept = (Kind.CACHE, Kind.META)  # of which a dense step touches next to nothing here
    touched = [value for value in (*call.outs, *call.ins) if value.kind not in kept]
    return Work(_bytes(touched, step))


def step_work(calls: Iterable[Call], step: Step) -> Work:
    """Of all that counts for a model as a whole: its projections and its attention."""
    counted = (call for call in calls if call.op in (*MATRICES, *EXPERTS, "attention"))
    return sum((work_of(call, step) for call in counted), start=Work())


def _product(call: Call, step: Step) -> Work:
    [weight] = [
        value for value in call.ins if value.kind is Kind.WEIGHT and len(value.shape) == _rank(call)
    ]
    *_, inputs = shape = sized(weight.shape, {})
    ops = 2.0 * prod(sized(call.outs[0].shape, step.sizes)) * inputs
    num_bytes = float(weight_bytes(weight))
    if call.op in EXPERTS:
        rows = prod(sized(call.outs[0].shape[:2], step.sizes))
        num_bytes *= min(1.0, rows / shape[0])
    is_int8 = call.op not in ("linear", "expert_linear")
    return Work(num_bytes, int8_ops=ops if is_int8 else 0, fp32_ops=0 if is_int8 else ops)


def _rank(call: Call) -> int:
    return 3 if call.op in EXPERTS else 2


def _attention(call: Call, step: Step) -> Work:
    [cache] = [value for value in call.ins if value.kind is Kind.CACHE]
    G, D = sized(cache.shape, {})
    attrs: Mapping[str, object] = dict(call.attrs)
    window = attrs.get("window") or step.context
    assert isinstance(window, int | float)
    kv_bytes = step.requests * min(step.context, window) * 2 * G * kv_head_bytes(D, cache.dtype)
    heads = prod(sized(call.outs[0].shape, step.sizes))  # T * H * D
    return Work(kv_bytes, fp32_ops=4.0 * heads * min(step.visible, window))


def _bytes(values: Iterable[Value], step: Step) -> float:
    fixed = {**step.sizes, Symbol.X: 0, Symbol.U: 0}  # block tables are small, nobody is sparse
    return float(
        sum(
            weight_bytes(value)
            if value.kind is Kind.WEIGHT
            else prod(sized(value.shape, fixed)) * BYTES[value.dtype]
            for value in values
        )
    )
