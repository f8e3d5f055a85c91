"""Every op of the checked backend against the specification on the same device, in fp32 and in bf16, and against itself.

Outputs and scratch hold NaN before the first call (see `worker`); the second finds what the first left behind.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from importlib.util import find_spec

import numpy as np

from tests.gpu.op_cases import Array, OpCase, fused_cases, in_bf16, op_cases, outputs, worst
from tests.gpu.results import Result
from tests.gpu.setting import Part, Setting
from vivace.kernels.backend import NO_OPS, Ops

SMALL = (  # under the memory checker: each kernel, awkward sizes; it takes its time
    "linear+bias 7x33x65",
    "linear 7x33x65, bf16",
    "rmsnorm 7x33",
    "silu 7x33",
    "rope_kv_write+norm 40x8x64",
    "attention+sinks 8/1x80",
    "attention 2/2x128, bf16",
    "attention+window 100 4/4x16",
    "moe_route softmax+renormalize 7x60x4",
    "expert_linear, own rows 7x60x4",
    "moe_assign 40x8x2",
    "expert_gated, silu 7x60x4",
    "expert_down 40x8x2, bf16",
    "moe_combine, gated 7x60x4",
    "sample 5x260",
    "logprobs 5x260",
)
QUANTIZED = ("int8", "int4", "quantize")  # no op of a GPU's backend


def cases() -> dict[str, OpCase]:
    """By name: those in fp32, then those that have a bf16 form."""
    plain = [*op_cases(), *fused_cases()]
    rounded = [case for one in plain if (case := in_bf16(one)) is not None]
    return {case.name: case for case in (*plain, *rounded)}


def parts() -> Mapping[str, Part]:
    """One for every case, and one that no op is missing."""
    found: dict[str, Part] = {name: partial(check, case=case) for name, case in cases().items()}
    return {"every op is there": every_op_is_there, **found}


def small_parts() -> Mapping[str, Part]:
    """What the memory checker sees."""
    known = cases()
    return {name: partial(run_once, case=known[name]) for name in SMALL}


def every_op_is_there(setting: Setting) -> Iterator[Result]:
    """An op that the backend lacks fails, whether or not a case calls it."""
    names = [one.name for one in fields(Ops) if one.name not in NO_OPS]
    for name in names:
        if any(word in name for word in QUANTIZED):
            continue
        is_there = find_spec(f"vivace.kernels.{name}.{setting.backend}") is not None
        if not is_there:
            yield Result(f"conformance/op {name}", False, note="not there")
    yield Result(f"conformance/ops of {setting.backend}", True, note=f"{len(names)} looked for")


def check(setting: Setting, case: OpCase) -> Iterator[Result]:
    """One case."""
    name = f"conformance/{case.name}"
    ops = setting.ops()
    got = outputs(case, ops)
    want = outputs(case, setting.reference())
    error = distance(case, got, want)
    again = all(map(same_bits, got, outputs(case, ops)))
    note = "" if again else "another call gives other bits"
    yield Result(name, error <= case.tolerance and again, error, note=note)


def run_once(setting: Setting, case: OpCase) -> Iterator[Result]:
    """Alone, for whoever watches its memory: what it gives is checked elsewhere."""
    outputs(case, setting.ops())
    yield Result(f"memcheck/{case.name}", None, note="run")


def distance(case: OpCase, got: list[Array], want: list[Array]) -> float:
    """Of bf16 relative to the norm, of fp32 to the largest number: the worst output's."""
    if "bf16" not in case.name:
        return worst(got, want)
    return max(map(_relative, got, want))


def _relative(got: Array, want: Array) -> float:
    a, b = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


def same_bits(first: Array, second: Array) -> bool:
    """Whether two arrays are equal to the last bit."""
    return first.tobytes() == second.tobytes()
