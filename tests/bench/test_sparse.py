"""Block-sparse decode finds what dense attention attends to, and is timed beside it."""

import json

import pytest

from tests.kernels.arrays import ops_of
from vivace.bench import cli, sparse
from vivace.kernels.backend import Backend


@pytest.mark.parametrize(("context", "heads"), [(16_384, 1), (16_384, 4), (65_536, 1)])
def test_a_needle_is_found_where_chance_finds_none(context, heads):
    """Four neighbouring tokens that hold half of the attention of one query head of a group, or of each."""
    found = sparse.needles(ops_of(Backend.CPU), context, budget=2_048, heads=heads)
    assert found.selected >= 19
    assert found.at_random <= 4
    assert 0.5 <= found.least_mass < 0.6


def test_the_report_has_every_part_of_a_sparse_step(capsys):
    words = "sparse --rounds 2 --context 2048 --budget 256 --layers 2 --threads 1"
    assert cli.main("bench", words.split()) == 0
    *_, line = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    figures = {one["name"]: one for one in record["figures"]}
    assert record["config"]["budget"] == 256
    assert all(one["median"] >= 0 for one in figures.values())
    assert figures["dense / sparse"]["repeats"] == 2
    parts = [
        figures[f"sparse decode, {op}, ms"] for op in ("block_score", "block_topk", "attention")
    ]
    assert sum(one["p5"] for one in parts) <= figures["sparse decode, ms"]["p95"]
    assert figures["needles of 20 in 2048, 1 of 4 heads, selected"]["median"] >= 19
