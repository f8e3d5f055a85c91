"""Fused programs: the same numbers from fewer ops, and nothing touched that does not match."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.architectures import MODELS, ONE_OF_EACH
from tests.kernels.arrays import ops_of
from tests.step_driver import make_driver
from tests.tiny_models import make_checkpoint
from vivace.engine.models.builder import Builder
from vivace.engine.models.decoder import emit
from vivace.engine.models.fuse import fuse
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.program import Symbol
from vivace.engine.models.quantize import Quantize, quantize
from vivace.kernels.backend import Backend
from vivace.kernels.buffer import DType

EXPERTS = (
    "qwen3-moe",
    "qwen2-moe-dense-layers",
    "gpt-oss",
    "gpt-oss-no-bias",
    "mixtral-window",
    "olmoe",
)
MOE_OPS = ("moe_route", "moe_assign", "expert_gated", "expert_down", "moe_combine")
T, K, E, F, M = Symbol.T, 2, 4, 6, 8


def checkpoint(directory, name):
    kind, overrides = MODELS[name]
    return make_checkpoint(directory, kind, **overrides)


def ops_in(program):
    return Counter(call.op for call in program.calls)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_fused_program_gives_the_same_logits(name, tmp_path):
    directory = checkpoint(tmp_path, name)
    tokens = np.random.default_rng(1).integers(0, 256, 40).tolist()
    plain, fused = (
        make_driver(directory, ops_of(Backend.REFERENCE), rewrite=rewrite)
        for rewrite in (lambda program: program, fuse)
    )
    want = plain.prompt_logits(tokens, 33)
    assert np.array_equal(fused.prompt_logits(tokens, 33), want)
    before, after = ops_in(plain.program), ops_in(fused.program)
    layers = before["moe_route"]
    assert layers > 0 and after["expert_linear"] == 0
    assert after["moe_assign"] == after["expert_gated"] == after["expert_down"] == layers
    assert after["gated"] == before["gated"] - layers  # what is left: shared experts and MLPs


@pytest.mark.triton
@pytest.mark.parametrize("name", ("qwen3-moe", "qwen2-moe-dense-layers", "gpt-oss"))
def test_experts_on_triton_give_the_logits_of_the_reference(name, tmp_path):
    """All else is the reference's here: an assignment must last until its last reader."""
    directory, reference = checkpoint(tmp_path, name), ops_of(Backend.REFERENCE)
    triton = ops_of(Backend.TRITON)
    mixed = replace(reference, **{op: getattr(triton, op) for op in MOE_OPS})
    tokens = np.random.default_rng(1).integers(0, 256, 18).tolist()
    want = make_driver(directory, reference).prompt_logits(tokens, 18)
    got = make_driver(directory, mixed, rewrite=fuse).prompt_logits(tokens, 17)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name not in EXPERTS])
def test_other_programs_stay_as_they_are(name, tmp_path):
    program = emit(read_spec(checkpoint(tmp_path, name)))
    assert fuse(program) == program


def test_a_quantized_program_stays_as_it_is(tmp_path):
    program = quantize(emit(read_spec(checkpoint(tmp_path, "qwen3-moe"))), Quantize.INT8, 32)
    assert fuse(program) == program


def experts_of(b, x):
    """Gate and up of a choice of experts, activated."""
    experts = b.activation("experts", T, K, dtype=DType.INT32)
    b.call("moe_route", (b.activation("weights", T, K), experts), (b.input("logits", T, E),))
    gate_up, act = b.activation("gate_up", T, K, 2 * F), b.activation("act", T, K, F)
    b.call("expert_linear", (gate_up,), (x, experts, b.weight("up", E, 2 * F, M)))
    b.call("gated", (act,), (gate_up,), (("activation", "gelu"),))
    return experts, gate_up, act


def test_what_is_read_elsewhere_is_still_made():
    b = Builder()
    _, gate_up, act = experts_of(b, b.input("x", T, M))
    b.call("add", (b.activation("add", T, K, 2 * F),), (gate_up, gate_up))
    program = b.finish(act, act)
    assert fuse(program) == program
    b = Builder()
    _, gate_up, act = experts_of(b, b.input("x", T, M))
    program = b.finish(b.view(gate_up, T, 2 * F), act)
    assert fuse(program) == program


def test_rows_of_each_slot_are_not_taken_for_shared_ones():
    b = Builder()
    _, _, act = experts_of(b, b.input("x", T, K, M))
    program = b.finish(act, act)
    assert fuse(program) == program


def test_one_assignment_serves_all_that_read_the_same_choice():
    b = Builder()
    experts, _, act = experts_of(b, b.input("x", T, M))
    outs = [b.activation("down", T, K, M) for _ in "ab"]
    for out in outs:
        b.call("expert_linear", (out,), (act, experts, b.weight("down", E, M, F)))
    other, _, act = experts_of(b, b.input("x", T, M))
    program = fuse(b.finish(outs[0], act))
    assigns = [call for call in program.calls if call.op == "moe_assign"]
    assert [call.ins for call in assigns] == [(experts,), (other,)]
    assert all(call.attrs == (("num_experts", E),) for call in assigns)
    order, tiles = assigns[0].outs
    assert order.shape == (T, K) and tiles.shape == (T, K, 3)
    downs = [call for call in program.calls if call.op == "expert_down"]
    assert len(downs) == 2 and all(call.ins[2:4] == (order, tiles) for call in downs)
    gated = next(call for call in program.calls if call.op == "expert_gated")
    assert gated.attrs == (("activation", "gelu"),)
