"""The host benchmark measures what it says; every result carries where it comes from."""

import json

import pytest

from vivace.__main__ import COMMANDS
from vivace.bench import cli, result


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
