"""The benchmarks measure what they say; every result carries where it comes from."""

import json
import math
from pathlib import Path

import pytest

from vivace.__main__ import COMMANDS
from vivace.bench import cli, process, result
from vivace.engine.events import FinishReason, TokenEvent

NORTHSTAR = Path(__file__).parents[2] / "examples" / "northstar"


def test_a_figure_is_the_median_and_the_spread_of_its_repeats():
    one = result.figure("x, ms", [float(i) for i in range(1, 22)])
    assert (one.median, one.repeats) == (11.0, 21)
    assert (one.p5, one.p95) == pytest.approx((2.0, 20.0))
    assert result.figure("x, ms", [3.0]) == result.Figure("x, ms", 3.0, 3.0, 3.0, 1)


def test_the_host_benchmark_prints_a_table_then_one_line_for_machines(capsys):
    assert COMMANDS["bench"][0] == cli.__name__
    assert cli.main("bench", ["host", "--requests", "4", "--rounds", "3"]) == 0
    *table, record = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in table] == ["host step", "plain floor", "ratio"]
    values = json.loads(record)
    assert {"command", "config", "commit", "dirty", "machine", "figures"} <= values.keys()
    assert values["config"] == {"rounds": 3}
    times = {one["name"]: one["median"] for one in values["figures"]}
    assert times["host step, 4 requests, ms"] > 0
    assert times["plain floor, 4 requests, ms"] > 0
    assert all(one["p5"] <= one["median"] <= one["p95"] for one in values["figures"])


def medians(capsys, *words):
    """What a command prints for machines: the median of each figure by its name."""
    assert cli.main("bench", list(words)) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["command"] == f"bench {words[0]}"
    return {one["name"]: one["median"] for one in record["figures"]}


def test_the_front_end_benchmark_compares_the_service_with_an_echo(capsys):
    found = medians(
        capsys, "frontend", "--rounds", "1", "--streams", "3", "--messages", "20", "--calls", "2"
    )
    compared = {
        "3 streams, messages/s": "3 streams",
        "3 streams, server CPU us a message": "3 streams, server CPU us a message",
        "GenerateUnary of one token, ms": "GenerateUnary of one token",
        "Generate of one token, ms": "Generate of one token",
    }
    names = {f"{whose}, {name}" for whose in ("service", "echo") for name in compared}
    names |= {f"ratio, {name}" for name in compared.values()}
    busy = {
        f"3 streams of {whose}, CPUs kept busy by {what}"
        for whose in ("service", "echo")
        for what in ("server", "load")
    }
    assert found.keys() == names | busy
    assert all(math.isfinite(value) and value > 0 for value in found.values())


def test_the_process_benchmark_compares_an_engine_process_with_a_core(capsys):
    words = ("--rounds", "1", "--streams", "2", "--tokens", "40", "--threads", "1")
    found = medians(capsys, "process", str(NORTHSTAR), *words)
    rates = [found[f"{which}, 2 streams, tokens/s"] for which in ("engine process", "in process")]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert found["ratio, 2 streams"] == pytest.approx(rates[0] / rates[1])


def test_a_decode_rate_counts_from_when_all_have_begun_to_when_one_has_ended():
    times = iter((1.0, 3.0, 7.0))
    meter = process.Meter(2, clock=lambda: next(times))
    for event in (
        TokenEvent("a", (1,)),
        TokenEvent("a", (1,)),
        TokenEvent("b", (1,)),
        TokenEvent("a", (1,)),
        TokenEvent("b", (1, 2, 3), finish=FinishReason.LENGTH),
        TokenEvent("a", (1,), finish=FinishReason.LENGTH),
    ):
        meter.note(event)
    assert meter.rate == 4 / (7.0 - 3.0)
