"""Calls that do not fit are refused in words that say what would have, by every backend alike."""

import numpy as np
import pytest

from tests.kernels.arrays import BACKENDS, ops_of
from vivace.kernels.backend import Backend
from vivace.kernels.buffer import DType

CACHE = "cache"  # of 4 blocks of 16 tokens, 2 heads of 8


def f(*shape):
    return np.zeros(shape, np.float32)


def i(*shape):
    return np.zeros(shape, np.int32)


def u(*shape):
    return np.zeros(shape, np.uint8)


ATTENTION = (f(3, 4, 8), f(3, 4, 8), CACHE, i(1, 2), i(2), i(1))
HEADS = {"num_kv_heads": 2, "scale": 1.0}
QKV = (f(3, 4, 8), CACHE, f(3, 64), f(3, 8), i(3))
NORM = {"num_kv_heads": 2, "eps": 1e-6}
ROUTE = (f(2, 3), i(2, 3), f(2, 12))
SOFTMAX = {"scoring": "softmax", "renormalize": True}
EXPERTS = (f(2, 3, 5), f(2, 7), i(2, 3), f(4, 5, 7))
ASSIGNED = (i(2, 3), i(2, 3, 3))
GATED = (f(2, 3, 5), f(2, 7), i(2, 3), *ASSIGNED, f(4, 10, 7))
DOWN = (f(2, 3, 5), f(2, 3, 7), i(2, 3), *ASSIGNED, f(4, 5, 7))
SMALL_EXPERTS = (f(2, 3, 5), u(2, 7), f(2, 2), i(2, 3), f(4, 5, 7))
SAMPLE = (i(2), f(2, 5), f(2, 5), f(2), i(2), f(2), f(2), np.zeros(2, np.int64), i(2))
NO_PENALTY = (f(2), f(2), f(2), i(3), i(0), i(0))
EPS = {"eps": 1e-6}
NO_BIAS = (i(3), i(0), f(0))
META = np.zeros((4, 2, 2, 8), np.uint16)  # of the cache's blocks
REQUESTS = (i(1, 2), i(2), i(1), i(1), i(1))
UNIT_SCORES = (f(1, 2, 2, 1), f(3, 4, 8), META, *REQUESTS)
IN_LAYER = {"layer": 0, "block_tokens": 16}
SCORING = IN_LAYER | {"scale": 1.0}
CHOICE = (i(1, 2, 2, 1), i(1, 2), f(1, 2, 2, 1), i(1), i(1), i(1))
SELECTION = (i(1, 2, 2, 1), i(1, 2))
KEPT = (f(1, 2), *ATTENTION[1:], *SELECTION, i(1))
FUSED = ("moe_assign", "expert_gated", "expert_down")
REFUSED = [
    ("linear", (f(2, 5), f(2, 4), f(5, 4), f(4)), {}, r"bias must be \[5\], got \[4\]"),
    ("linear", (f(2, 5), f(2, 4), f(5, 4), i(5)), {}, "bias must hold float32"),
    ("quantize", (u(2, 4), f(2, 2), f(2, 5)), {}, r"q must be \[2, 5\], got \[2, 4\]"),
    ("quantize", (u(2, 4), f(2, 1), f(2, 4)), {}, r"params must be \[2, 2\], got \[2, 1\]"),
    ("quantize", (f(2, 4), f(2, 2), f(2, 4)), {}, "q must hold uint8, got"),
    ("quantize", (u(1, 65537), f(1, 2), f(1, 65537)), {}, "x must have at most 65536 inputs, got 65537"),
    ("rmsnorm_quantize", (u(2, 4), f(2, 2), f(2, 5), f(5)), EPS, r"q must be \[2, 5\], got \[2, 4\]"),
    ("rmsnorm_quantize", (u(2, 4), f(2, 2), f(2, 4), f(5)), EPS, r"x must be \[any, 5\], got \[2, 4\]"),
    ("add_rmsnorm_quantize", (f(2, 5), u(2, 4), f(2, 2), f(2, 4), f(2, 4), f(4)), EPS, r"sum must be \[2, 4\]"),
    ("add_rmsnorm_quantize", (f(2, 4), f(2, 4), f(2, 2), f(2, 4), f(2, 4), f(4)), EPS, "q must hold uint8"),
    ("gated_quantize", (u(2, 4), f(2, 1), f(2, 8)), {}, r"params must be \[2, 2\], got \[2, 1\]"),
    ("gated_quantize", (u(2, 4), f(2, 2), f(2, 9)), {}, r"gate_up must be \[2, 8\], got \[2, 9\]"),
    ("gated_quantize", (u(2, 4), f(2, 2), f(2, 8)), {"activation": "relu"}, "one of silu, gelu, .*got 'relu'"),
    ("gated_quantize", (u(1, 65537), f(1, 2), f(1, 131074)), {}, "at most 65536 columns, got 65537"),
    ("linear_int8", (f(2, 5), u(2, 4), f(2, 2), f(5, 4)), {}, "weight must hold int8, got"),
    ("linear_int4", (f(2, 5), u(2, 3), f(2, 2), f(5, 4)), {}, r"q must be \[any, 4\], got \[2, 3\]"),
    ("linear_int8", (f(2, 5), u(2, 65537), f(2, 2), f(5, 65537)), {}, "at most 65536 inputs, got 65537"),
    ("embed_int8", (f(2, 4), i(2), f(9, 4)), {}, "table must hold int8, got"),
    ("rope_table", (f(2, 8), i(2), f(4)), {"scale": 1.0}, r"inv_freq must be \[any, any\]"),
    ("rope_table", (f(2, 8), i(2), f(0, 4)), {"scale": 1.0}, "inv_freq must have a row"),
    ("rope_table", (f(2, 8), i(2), f(1, 4), i(3)), {"scale": 1.0}, r"variants must be \[2\]"),
    ("rope_table", (f(2, 8), i(2), f(1, 4), f(2)), {"scale": 1.0}, "variants must hold int32"),
    ("rope_kv_write", (*QKV, f(8), f(16)), NORM, r"k_norm must be \[8\], got \[16\]"),
    ("rope_kv_write", (*QKV, f(32), f(8)), NORM, r"k_norm must be \[16\], got \[8\]"),
    ("rope_kv_write", (*QKV, f(16), f(16)), NORM, r"q_norm must be \[32\], got \[16\]"),
    ("rope_kv_write", (*QKV, f(8), None), NORM, "q_norm and k_norm are given together"),
    ("attention", (*ATTENTION, f(2)), HEADS, r"sinks must be \[4\], got \[2\]"),
    ("attention", (*ATTENTION, i(4)), HEADS, "sinks must hold float32"),
    ("attention", ATTENTION, HEADS | {"window": -1}, "window must be at least 0, got -1"),
    ("attention", ATTENTION, HEADS | {"softcap": -2.0}, "softcap must be at least 0, got -2.0"),
    ("attention", (*ATTENTION, None, SELECTION[0]), HEADS, "selected and num_selected are given together"),
    ("attention", (*ATTENTION, None, i(1, 1, 2, 1), i(1, 2)), HEADS, r"selected must be \[1, 2, 2, any\]"),
    ("attention", (*ATTENTION, None, SELECTION[0], i(2, 2)), HEADS, r"num_selected must be \[1, 2\], got \[2, 2\]"),
    ("attention", (*ATTENTION, None, f(1, 2, 2, 1), i(1, 2)), HEADS, "selected must hold int32"),
    ("attention", (*ATTENTION, None, *SELECTION), HEADS | {"window": 5}, "window must be 0 with a selection, got 5"),
    ("block_meta_update", (META[:3], CACHE, i(1)), {"block_tokens": 16}, "meta must have 4 units, of 4 blocks, got 3"),
    ("block_meta_update", (META, CACHE, f(1)), {"block_tokens": 16}, "units must hold int32"),
    ("block_meta_update", (f(4, 2, 2, 8), CACHE, i(1)), {"block_tokens": 16}, "meta must hold bfloat16"),
    ("block_meta_update", (META, CACHE, i(1)), {"block_tokens": 8}, r"block_tokens \(8\) does not fit"),
    ("block_score", (f(1, 2, 2, 2), *UNIT_SCORES[1:]), SCORING, r"scores must be \[1, 2, 2, 1\]"),
    ("block_score", (UNIT_SCORES[0], f(3, 3, 8), *UNIT_SCORES[2:]), SCORING, "2 KV heads of meta must divide 3"),
    ("block_score", (*UNIT_SCORES[:6], i(2), i(1)), SCORING, r"budgets must be \[1\], got \[2\]"),
    ("block_score", UNIT_SCORES, SCORING | {"layer": -1}, "layer must be at least 0, got -1"),
    ("block_topk", (*CHOICE[:2], f(1, 2, 2, 2), *CHOICE[3:]), IN_LAYER, r"scores must be \[any, any, any, 1\]"),
    ("block_topk", (CHOICE[0], i(1, 3), *CHOICE[2:]), IN_LAYER, r"num_selected must be \[1, 2\], got \[1, 3\]"),
    ("block_topk", (*CHOICE[:5], f(1)), IN_LAYER, "dense_layers must hold int32"),
    ("kept_mass", (f(1, 3), *KEPT[1:]), HEADS, r"mass must be \[1, 2\], got \[1, 3\]"),
    ("kept_mass", (*KEPT[:-1], f(1)), HEADS, "measured must hold int32"),
    ("kept_mass", (*KEPT, f(2, 2)), HEADS, r"before must be \[1, 2\], got \[2, 2\]"),
    ("kept_mass", KEPT, HEADS | {"softcap": -1.0}, "softcap must be at least 0, got -1.0"),
    ("gated", (f(4), f(8)), {}, r"out must have at least two dimensions, got \[4\]"),
    ("gated", (f(2, 3, 4), f(2, 4, 8)), {}, r"gate_up must be \[2, 3, 8\], got \[2, 4, 8\]"),
    ("gated", (f(2, 4), f(2, 8)), {"activation": "relu"}, "one of silu, gelu, .*got 'relu'"),
    ("gated", (f(2, 4), f(2, 8)), {"limit": -1.0}, "limit must be positive, got -1.0"),
    ("softcap", (f(2, 4), f(2, 5)), {"cap": 1.0}, r"out must be \[2, 5\], got \[2, 4\]"),
    ("softcap", (f(2, 4), f(2, 4)), {"cap": 0.0}, "cap must be positive, got 0.0"),
    ("add", (f(2, 4), f(2, 4), f(1, 4)), {}, r"residual must be \[2, 4\], got \[1, 4\]"),
    ("add", (f(8), f(2, 4), f(2, 4)), {}, r"out must be \[2, 4\], got \[8\]"),
    ("moe_route", (f(2, 3), i(2, 4), f(2, 12)), SOFTMAX, r"experts must be \[2, 3\]"),
    ("moe_route", (f(2, 3), f(2, 3), f(2, 12)), SOFTMAX, "experts must hold int32"),
    ("moe_route", (*ROUTE, None, f(3)), SOFTMAX, r"bias must be \[12\], got \[3\]"),
    ("moe_route", (*ROUTE, np.zeros(3, np.int64)), SOFTMAX, r"loads must be \[12\], got \[3\]"),
    ("moe_route", (*ROUTE, i(12)), SOFTMAX, "loads must hold int64"),
    ("moe_route", ROUTE, SOFTMAX | {"scoring": "max"}, "one of softmax, sigmoid, got 'max'"),
    ("moe_route", ROUTE, SOFTMAX | {"num_groups": 5}, r"num_groups \(5\) must divide 12"),
    ("moe_route", ROUTE, SOFTMAX | {"num_groups": 0}, r"num_groups \(0\) must divide 12"),
    ("moe_route", ROUTE, SOFTMAX | {"num_groups": 3, "top_groups": 4}, "1 to 3, got 4"),
    ("moe_route", ROUTE, SOFTMAX | {"num_groups": 3, "top_groups": 0}, "1 to 3, got 0"),
    ("moe_route", ROUTE, SOFTMAX | {"num_groups": 6}, "must be 1 to 2 .*, got 3"),
    ("moe_route", (f(2, 0), i(2, 0), f(2, 12)), SOFTMAX, "must be 1 to 12 .*, got 0"),
    ("moe_route", (f(2, 13), i(2, 13), f(2, 12)), SOFTMAX, "must be 1 to 12 .*, got 13"),
    ("expert_linear", (f(2, 3, 4), *EXPERTS[1:]), {}, r"out must be \[2, 3, 5\]"),
    ("expert_linear", (EXPERTS[0], f(2, 2, 7), *EXPERTS[2:]), {}, r"x must be \[2, 3, 7\]"),
    ("expert_linear", (EXPERTS[0], f(3, 7), *EXPERTS[2:]), {}, r"x must be \[2, 7\]"),
    ("expert_linear", (*EXPERTS[:2], f(2, 3), EXPERTS[3]), {}, "experts must hold int32"),
    ("expert_linear", (*EXPERTS, f(5)), {}, r"bias must be \[4, 5\], got \[5\]"),
    ("moe_assign", (*ASSIGNED, f(2, 3)), {"num_experts": 4}, "experts must hold int32"),
    ("moe_assign", (*ASSIGNED, i(2, 4)), {"num_experts": 4}, r"order must be \[2, 4\], got \[2, 3\]"),
    ("moe_assign", (i(2, 3), i(2, 3, 2), i(2, 3)), {"num_experts": 4}, r"tiles must be \[2, 3, 3\]"),
    ("moe_assign", (*ASSIGNED, i(2, 3)), {"num_experts": 0}, "at least 1, got 0"),
    ("expert_gated", (*GATED[:5], f(4, 9, 7)), {}, r"gate_up must be \[any, 10, any\], got \[4, 9, 7\]"),
    ("expert_gated", (GATED[0], f(2, 3, 7), *GATED[2:]), {}, r"x must be \[2, 7\]"),
    ("expert_gated", (*GATED[:2], f(2, 3), *GATED[3:]), {}, "experts must hold int32"),
    ("expert_gated", (*GATED[:3], i(2, 4), *GATED[4:]), {}, r"order must be \[2, 3\], got \[2, 4\]"),
    ("expert_gated", (*GATED[:5], i(4, 10, 7)), {}, "gate_up must hold float32, float16 or bfloat16"),
    ("expert_gated", (*GATED, f(4, 5)), {}, r"bias must be \[4, 10\], got \[4, 5\]"),
    ("expert_gated", GATED, {"activation": "relu"}, "one of silu, gelu, .*got 'relu'"),
    ("expert_down", (DOWN[0], f(2, 7), *DOWN[2:]), {}, r"x must be \[2, 3, 7\]"),
    ("expert_down", (f(2, 3, 4), *DOWN[1:]), {}, r"out must be \[2, 3, 5\]"),
    ("expert_down", (*DOWN[:4], f(2, 3, 3), DOWN[5]), {}, "tiles must hold int32"),
    ("expert_down", (*DOWN, f(4, 6)), {}, r"bias must be \[4, 5\], got \[4, 6\]"),
    ("expert_linear_int8", SMALL_EXPERTS, {}, "weight must hold int8, got"),
    ("expert_linear_int4", SMALL_EXPERTS, {}, "weight must hold int4, got"),
    ("expert_linear_int8", (f(2, 3, 4), *SMALL_EXPERTS[1:]), {}, r"out must be \[2, 3, 5\]"),
    ("expert_linear_int8", (*SMALL_EXPERTS[:1], u(2, 2, 7), *SMALL_EXPERTS[2:]), {}, r"q must be \[2, 3, 7\]"),
    ("expert_linear_int4", (*SMALL_EXPERTS[:1], u(2, 3, 7), *SMALL_EXPERTS[2:]), {}, r"params must be \[2, 3, 2\]"),
    ("expert_linear_int4", (*SMALL_EXPERTS, f(5)), {}, r"bias must be \[4, 5\], got \[5\]"),
    ("sample", (*SAMPLE, *NO_PENALTY, i(3), i(2), f(3)), {}, r"bias_values must be \[2\], got \[3\]"),
    ("sample", (*SAMPLE, *NO_PENALTY, i(2), i(0), f(0)), {}, r"bias_starts must be \[3\]"),
    ("sample", (*SAMPLE, f(2), f(2), f(3), i(3), i(0), i(0), *NO_BIAS), {}, r"presence must be \[2\]"),
    ("sample", (*SAMPLE, *[f(2)] * 3, i(3), i(2), i(1), *NO_BIAS), {}, r"penalty_counts must be \[2\]"),
    ("sample", (*SAMPLE, *[f(2)] * 3, i(3), i(2), f(2), *NO_BIAS), {}, "penalty_counts must hold int32"),
    ("moe_combine", (f(2, 5), f(2, 3, 5), f(2, 4)), {}, r"weights must be \[2, 3\]"),
    ("moe_combine", (f(2, 5), f(2, 3, 5), f(2, 3), f(2, 4)), {}, r"shared must be \[2, 5\]"),
    ("moe_combine", (f(2, 5), f(2, 3, 5), f(2, 3), f(2, 5), f(2)), {}, r"shared_gate must be \[2, 1\]"),
    ("moe_combine", (f(2, 5), f(2, 3, 5), f(2, 3), None, f(2, 1)), {}, "only with shared"),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda one: one.value)
@pytest.mark.parametrize(("op", "arrays", "attrs", "words"), REFUSED)
def test_a_call_that_does_not_fit_is_refused(backend, op, arrays, attrs, words):
    if op in FUSED and backend is not Backend.REFERENCE:
        pytest.skip("the CPU's programs are not fused")
    memory = ops_of(backend).memory
    buffers = [
        memory.kv_cache(4, 16, 2, 8, DType.FP32)
        if isinstance(x, str)
        else x if x is None else memory.upload(x)
        for x in arrays
    ]  # fmt: skip
    with pytest.raises(ValueError, match=words):
        getattr(ops_of(backend), op)(*buffers, **attrs)
