"""What sparse decode costs is measured, and the guard that undoes it works on a model that was trained."""

import json
from pathlib import Path

import pytest

from vivace.bench import sparse_quality
from vivace.bench.sparse_quality import Load
from vivace.engine.errors import ConfigError

NORTHSTAR = Path(__file__).parents[2] / "examples" / "northstar"
FEW = Load(rows=2, least=900, most=1000, tokens=12, budget=256)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """The demo's conversation, again and again."""
    parts = json.loads((NORTHSTAR / "conversation" / "conversation.json").read_text("utf-8"))
    replies = json.loads((NORTHSTAR / "conversation" / "replies.json").read_text("utf-8"))
    turns = [{"role": "system", "content": parts["policy"]}]
    for turn, reply in zip(parts["turns"], replies["replies"], strict=True):
        turns.append({"role": "user", "content": turn["user"]})
        turns.append({"role": "assistant", "content": reply["text"]})
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("\n".join([json.dumps({"turns": turns})] * 20), encoding="utf-8")
    return path


def test_rows_are_texts_cut_in_two(chats):
    rows = sparse_quality.read_rows(NORTHSTAR, chats, FEW)
    assert [(len(row.prompt), len(row.rest)) for row in rows] == [(900, 12), (1000, 12)]
    assert rows[0].prompt == rows[1].prompt[:900]
    with pytest.raises(ConfigError, match="must hold chats for 200 prompts, got"):
        sparse_quality.read_rows(NORTHSTAR, chats, Load(rows=200))


def test_the_guard_at_0_999_brings_every_request_back_to_dense(chats):
    rows = sparse_quality.read_rows(NORTHSTAR, chats, FEW)
    figures = sparse_quality.measure(NORTHSTAR, rows, FEW)
    found = {one.name: one for one in figures}
    assert found["guard: requests returned to dense, %"].median == 100
    assert found["guard: sparse tokens before"].median == 1
    kept = found["kept attention mass of a token"]
    assert 0 < kept.p5 < kept.median < 1 and kept.repeats == 2 * 11
    assert found["kept attention mass, least of all tokens"].median <= kept.p5
    dense, selected = (found[f"{name}, perplexity"].median for name in ("dense", "sparse"))
    assert 1 < dense < 20 and abs(selected / dense - 1) < 0.1 and selected != dense
    assert found["guard at 0.999: tokens that differ from dense, %"].median < 50
