"""Shares of the roofline: what a call must read and compute, by hand; and the table of a real step."""

import json
from pathlib import Path

import pytest

from vivace.bench import cli, cpu
from vivace.bench.job import Job, random_job, timing
from vivace.bench.roofline import Step, Work, step_work, work_of
from vivace.engine.config import Config, CpuConfig, quantized_by
from vivace.engine.models.program import Call, Kind, Program, Symbol, Value
from vivace.kernels.buffer import DType
from vivace.kernels.cpu.probe import Peaks

NORTHSTAR = Path(__file__).parents[2] / "examples" / "northstar"
DECODE = Step(4, 4, context=100, visible=90)
PEAKS = Peaks(read=1e9, fp32=2e9, int8=4e9, bf16=None)


def value(name, kind, *shape, dtype=DType.FP32):
    return Value(name, kind, shape, dtype)


def activation(*shape, dtype=DType.FP32):
    return value("x", Kind.ACTIVATION, *shape, dtype=dtype)


LINEAR = Call(
    "linear",
    (activation(Symbol.T, 8),),
    (activation(Symbol.T, 16), value("layers.3.mlp.down", Kind.WEIGHT, 8, 16)),
)
EXPERT = Call(
    "expert_linear",
    (activation(Symbol.T, 2, 8),),
    (
        activation(Symbol.T, 16),
        value("ids", Kind.ACTIVATION, Symbol.T, 2, dtype=DType.INT32),
        value("layers.0.moe.up", Kind.WEIGHT, 32, 8, 16),
    ),
)
ATTENTION = Call(
    "attention",
    (activation(Symbol.T, 6, 5),),
    (activation(Symbol.T, 6, 5), value("kv", Kind.CACHE, 3, 5)),
)
ADD = Call("add", (activation(Symbol.T, 7),), (activation(Symbol.T, 7), activation(Symbol.T, 7)))


@pytest.mark.parametrize(
    ("call", "work"),
    [
        (LINEAR, Work(8 * 16 * 4, fp32_ops=2 * 4 * 8 * 16)),
        # 4 tokens of 2 experts each meet 8 of 32
        (EXPERT, Work(8 * 8 * 16 * 4, fp32_ops=2 * 4 * 2 * 8 * 16)),
        (ATTENTION, Work(4 * 100 * 2 * 3 * 5 * 4, fp32_ops=4 * 4 * 6 * 5 * 90)),
        (ADD, Work(3 * 4 * 7 * 4)),
    ],
    ids=lambda one: getattr(one, "op", ""),
)
def test_a_call_must_read_and_compute_so_much(call, work):
    assert work_of(call, DECODE) == work


def test_a_window_hides_what_is_before_it():
    call = Call("attention", ATTENTION.outs, ATTENTION.ins, (("window", 10),))
    assert work_of(call, DECODE) == Work(4 * 10 * 2 * 3 * 5 * 4, fp32_ops=4 * 4 * 6 * 5 * 10)


def test_an_int8_projection_is_bound_by_other_peaks():
    weight = value("w", Kind.WEIGHT, 64, 64, dtype=DType.INT8)
    call = Call("linear_int8", (activation(Symbol.T, 64),), (activation(Symbol.T, 64), weight))
    work = work_of(call, DECODE)
    assert (work.int8_ops, work.fp32_ops) == (2 * 4 * 64 * 64, 0)
    assert 64 * 64 <= work.num_bytes <= 64 * 64 * 1.2
    assert work.bounds(PEAKS)["int8 peak"] == work.int8_ops / 4e9
    assert "int8 peak" not in work.bounds(Peaks(1e9, 1e9, None, None))


def test_a_step_is_its_projections_and_its_attention():
    found = step_work([LINEAR, ADD, ATTENTION], DECODE)
    assert found == work_of(LINEAR, DECODE) + work_of(ATTENTION, DECODE)


def test_ops_are_summed_over_layers_and_held_against_the_nearest_limit():
    other = Call(
        "linear", LINEAR.outs, (LINEAR.ins[0], value("layers.4.mlp.down", Kind.WEIGHT, 8, 16))
    )
    program = Program((LINEAR, other, ADD), ADD.outs[0], ADD.outs[0])
    times = [("linear", 1e-6), ("linear", 3e-6), ("add", 1e-6), ("sample", 2e-6)]
    found = {one.name: one.median for one in cpu.op_figures("now", program, DECODE, [times], PEAKS)}
    assert found == pytest.approx(
        {
            "now, linear layers.mlp.down, us": 4.0,
            # 1,024 bytes at 1 GB/s take 1.024 us, 2,048 operations at 2 GFLOP/s as long: the first counts
            "now, linear layers.mlp.down, % of bandwidth": 1.024 / 4 * 100,
            "now, add, us": 1.0,
            "now, add, % of bandwidth": 33.6,
            "now, sample, us": 2.0,
        }
    )


def test_the_highest_of_each_peak_counts():
    found = cpu.highest([Peaks(1, 5, None, 3), Peaks(2, 4, None, 2)])
    assert found == Peaks(2, 5, None, 3)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_table_has_peaks_the_model_and_each_op(monkeypatch, quantize):
    monkeypatch.setattr(cpu, "probe", lambda library, repeats: PEAKS)
    config = Config(model=NORTHSTAR, cpu=CpuConfig(threads=1), weights=quantized_by(quantize))
    load = cpu.Load(rounds=2, prompt=20, tokens=4, streams=3, own=6, probes=1)
    found = {one.name: one for one in cpu.measure(config, load)}
    assert found["read bandwidth, GB/s"].median == 1.0
    for kind in ("prefill of 20", "decode at 20", "decode of 3"):
        assert found[f"{kind}, ms"].repeats == 2
        assert found[f"{kind}, % of bandwidth"].median > 0
        op = "linear" if quantize == "none" else "linear_int8"
        ops = [name for name in found if name.startswith(f"{kind}, {op} layers.mlp.down, ")]
        assert len(ops) == 2
        assert all(found[name].median > 0 for name in ops)
    assert ("decode at 20, quantize, us" in found) == (quantize == "int8")


def test_the_command_names_model_and_settings(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "measure", lambda config, load: [])
    assert cli.main("bench", ["cpu", str(NORTHSTAR), "--quantize", "int4", "--threads", "1"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["quantize"] == "int4" and record["config"]["model"] == "northstar"


def test_a_job_is_timed_by_what_came_when():
    job = Job(((1,), (2,)), 3)
    events = [(0, 2.0, 1), (1, 4.0, 1), (0, 4.0, 1), (0, 5.0, 1), (1, 6.0, 2), (1, 6.0, 0)]
    found = timing(1.0, events, job)
    assert (found.ttft_s, found.decode_rate, found.wall_s) == (2.0, 1.5, 5.0)


def test_a_job_that_is_not_done_has_no_time():
    with pytest.raises(RuntimeError, match="2 tokens for each prompt"):
        timing(0.0, [(0, 1.0, 2), (1, 1.0, 1)], Job(((1,), (2,)), 2))


def test_jobs_differ_by_seed_and_kind_and_share_what_they_should():
    sizes = {"streams": 3, "prompt": 4, "shared": 5, "tokens": 1}
    job = random_job(1, **sizes)
    assert job == random_job(1, **sizes)
    assert len({prompt[:5] for prompt in job.prompts}) == 1 and len(set(job.prompts)) == 3
    others = [random_job(seed, **sizes) for seed in (-1, 0, 2, -2)]
    others.append(random_job(1, **{**sizes, "streams": 4}))
    assert all(other.prompts[0] != job.prompts[0] for other in others)
