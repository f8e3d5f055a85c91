"""The GPU check itself, without a GPU: it judges as its bars say, outlives what it runs, and never makes a figure up."""

import json
import textwrap
from dataclasses import replace

import pytest
import torch

from tests.gpu import check, conformance
from tests.gpu.bars import BARS, BESIDE, beside_peers, figure, judged
from tests.gpu.crew import Crew, Deadline, slices
from tests.gpu.results import Report, Result
from tests.gpu.sections import SECTIONS, Section
from tests.gpu.setting import Setting
from tests.gpu.timing import L2_TURNS, Meter, Timing, copies
from tests.gpu.worker import Job, results_of

CEILINGS = {"copy": 4e12, "product": 8e14}


def timing(us):
    return Timing(us, 0.9 * us, 1.1 * us)


@pytest.mark.parametrize(("us", "passed"), [(70.0, True), (80.0, False)])
def test_a_share_of_the_copy_is_what_passes(us, passed):
    found = figure("decode/8 x 8k, 256 MB", timing(us), work=256e6, of="copy")
    result = judged(found, CEILINGS, error=1e-3, tolerance=1e-2)
    assert result.passed is passed
    assert result.share == pytest.approx(256e6 / (us * 1e-6) / 4e12)


def test_a_fast_figure_that_is_wrong_fails():
    found = figure("sampling/temperature", timing(1.0))
    assert judged(found, {}, error=0.0, tolerance=0.0).passed
    assert judged(found, {}, error=1 / 16, tolerance=0.0).passed is False
    assert judged(found, {}, error=float("nan"), tolerance=1.0).passed is False


def test_a_bar_without_its_ceiling_fails():
    found = figure("prefill/16k", timing(1.0), work=1e12, of="product")
    assert judged(found, {"copy": 4e12}, error=0.0, tolerance=0.0).passed is False


def test_sparse_is_judged_by_the_dense_op_and_sampling_by_its_time():
    found = figure("sparse/32k", timing(50.0), work=1.0, of="dense")
    assert judged(found, {}, error=0.0, tolerance=0.0, dense_us=91.0).passed
    assert judged(found, {}, error=0.0, tolerance=0.0, dense_us=89.0).passed is False
    slow = figure("sampling/temperature", timing(15.1))
    assert judged(slow, {}, error=0.0, tolerance=0.0).passed is False


def one(name, us, passed=None):
    return Result(name, passed, us=us, p5_us=us, p95_us=us, error=0.0)


def test_we_are_beside_the_fastest_peer_that_is_right():
    ours, peers = BESIDE[0].ours, BESIDE[0].peers
    found = [one(ours, 50.0), one(f"{peers}slow", 60.0), one(f"{peers}wrong", 10.0, False)]
    first, *others = beside_peers(found)
    assert first.passed
    assert first.share == pytest.approx(1.2)
    assert all(other.passed is False and "not there" in other.note for other in others)
    first, *_ = beside_peers([*found, one(f"{peers}fast", 49.0)])
    assert first.passed is False
    first, *_ = beside_peers([one(ours, 50.0)])
    assert first.passed is False


def test_prefill_must_be_faster_than_flex_attention_alone():
    found = [
        one("prefill/16k", 100.0),
        one("peers/prefill/16k/flex_attention", 116.0),
        one("peers/prefill/16k/SDPA cuDNN", 50.0),
    ]
    passed = {result.name: result.passed for result in beside_peers(found)}
    assert passed["beside/prefill/16k"]


def test_inputs_are_more_than_the_cache_holds():
    l2 = 60 << 20
    for size in (1, 600_000, 16 << 20, 1 << 30):
        assert copies(size, l2) >= 2
        assert copies(size, l2) * size >= L2_TURNS * l2
    assert copies(100, 0) == 2


def test_all_is_warmed_up_before_the_seal_and_nothing_after_it():
    calls = []
    meter = Meter("cpu", lambda: calls.append("seal"))
    meter.times({"a": [lambda: calls.append("a")], "b": [lambda: calls.append("b")]})
    assert calls == ["a", "b", "seal", "a", "b"]


def test_no_time_of_a_rehearsal_is_kept(tmp_path):
    report = Report(tmp_path / "r.json", {"device": "cpu"}, is_rehearsal=True)
    found = figure("sampling/temperature", timing(1.0))
    wrong = judged(found, {}, error=1.0, tolerance=0.0)
    report.add([judged(found, {}, error=0.0, tolerance=0.0), wrong, Result("op", True, 1e-6)])
    report.write(is_complete=False)
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["is_rehearsal"] is True
    assert [result["passed"] for result in record["results"]] == [None, False, True]
    assert all(result[k] is None for result in record["results"] for k in ("us", "share", "rate"))
    assert report.failed == ["sampling/temperature"]


FAKE = """
    import json, os, sys, time
    job = json.loads(sys.argv[1])
    print("a library says hello")
    for part in job["parts"]:
        print(json.dumps({"part": part, "event": "begin"}), flush=True)
        result = {"name": part, "passed": True}
        if part.startswith("crash"):
            os.abort()
        if part.startswith("hang"):
            time.sleep(60)
        print(json.dumps({"part": part, "event": "result", "result": result}), flush=True)
        print(json.dumps({"part": part, "event": "end"}), flush=True)
"""


@pytest.fixture
def crew(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(FAKE))

    def make(limit_s=30.0):
        return Crew(tmp_path / "log", Deadline(limit_s), worker=path)

    return make


def passed_of(crew, parts, part_limit_s=5.0):
    job = Job("s", parts, {"device": "cpu"})
    found = crew.run(job, Section(dict, 1, part_limit_s), [])
    return {result.name.removeprefix("s/"): result.passed for result in found}


def test_a_part_that_kills_its_process_takes_no_other_with_it(crew, tmp_path):
    passed = passed_of(crew(), ["a", "crash", "b", "crash again", "c"])
    assert passed == {"a": True, "crash": False, "b": True, "crash again": False, "c": True}
    assert "a library says hello" in (tmp_path / "log").read_text()


def test_a_part_that_hangs_is_ended_and_the_rest_runs(crew):
    assert passed_of(crew(), ["hang", "a"], 0.5) == {"hang": False, "a": True}


def test_what_there_is_no_time_for_fails(crew):
    assert passed_of(crew(2.0), ["a", "hang", "b"], 50.0) == {"a": True, "hang": False, "b": False}


def test_a_job_that_only_crashes_ends(crew):
    passed = passed_of(crew(), [f"crash {i}" for i in range(20)])
    assert set(passed.values()) == {False}
    assert len(passed) == 20


def test_parts_are_dealt_to_workers():
    assert slices("abcde", 2) == [["a", "c", "e"], ["b", "d"]]
    assert slices("ab", 5) == [["a"], ["b"]]


def test_an_op_that_is_not_there_fails_and_so_does_any_other_error():
    def lacks(setting):
        yield Result("first", True)
        raise NotImplementedError("no op")

    def breaks(setting):
        raise RuntimeError("illegal memory access\nand more")
        yield

    first, second = results_of("bars", "p", lacks, Setting())
    assert first.passed
    assert (second.passed, second.note) == (False, "not there: no op")
    (only,) = results_of("bars", "p", breaks, Setting())
    assert (only.passed, only.note) == (False, "RuntimeError: illegal memory access")
    (only,) = results_of("peers", "p", breaks, Setting())
    assert only.passed is None  # a peer's trouble is not ours


def test_a_backend_without_ops_fails_for_each_of_them():
    found = list(conformance.every_op_is_there(Setting(backend="tpu")))
    missing = {r.name.removeprefix("conformance/op ") for r in found if r.passed is False}
    assert {"linear", "attention", "sample", "block_topk"} <= missing


def test_what_is_infinite_can_be_written(tmp_path):
    report = Report(tmp_path / "r.json", {}, is_rehearsal=False)
    report.add([Result("a", False, float("inf"), note="more"), Result("b", False, float("nan"))])
    report.write(is_complete=True)
    first, second = json.loads((tmp_path / "r.json").read_text())["results"]
    assert (first["error"], first["note"]) == (None, "error inf. more")
    assert (second["error"], second["note"]) == (None, "error nan.")


def broken(ops, name, place):
    """The ops, one of which adds a little to one of its outputs, and then gives its own bits each time."""
    run = getattr(ops, name)

    def run_and_spoil(*args, **attrs):
        run(*args, **attrs)
        args[place].flatten()[:1] += 1

    return replace(ops, **{name: run_and_spoil})


SPOILED = [
    ("sampling, temperature", "sample", 0),
    ("decode, 8 x 8k, 256 MB", "attention", 0),
    ("prefill, 16k", "attention", 0),
    ("sparse, 32k", "attention", 0),
    ("moe, 8 tokens", "moe_combine", 0),
    ("moe, 1 tokens", "expert_gated", 0),
]


@pytest.mark.parametrize(("part", "op", "place"), SPOILED)
def test_a_wrong_op_has_no_figure(monkeypatch, part, op, place):
    setting = Setting("cpu", "reference", is_tiny=True)
    plain = Setting.ops
    run = SECTIONS["bars"].parts()[part]
    assert not [r for r in run(setting) if r.note.startswith("wrong")]
    monkeypatch.setattr(Setting, "ops", lambda self: broken(plain(self), op, place))
    assert [r for r in run(setting) if r.passed is False and r.note.startswith("wrong")]


@pytest.mark.parametrize(
    ("part", "op"),
    [
        ("attention reads nothing else, fp32, window 100", "attention"),
        ("attention, fp32: each_row_is_alone", "attention"),
        ("attention, fp32: a_graph_follows_its_buffers", "attention"),
        ("sparse, as_specified", "block_score"),
        ("sparse, dense_to_the_bit", "attention"),
        ("sparse, graph_and_twice", "attention"),
        ("expert_layer, fp32", "expert_down"),
        ("sampled_rows", "sample"),
        ("sampling_graph", "sample"),
        ("graphs, fp32", "moe_combine"),
        ("norm", "rmsnorm"),
    ],
)
def test_an_op_that_other_rows_change_fails_an_anchor(monkeypatch, part, op):
    """Of the reference; what it adds grows with every call, as if it read what is not its own."""
    setting = Setting("cpu", "reference", is_tiny=True)
    count = iter(range(1, 10**6))

    def spoiled(self):
        ops = plain(self)
        run = getattr(ops, op)

        def run_and_spoil(*args, **attrs):
            run(*args, **attrs)
            args[0].flatten()[:1] += next(count)

        return replace(ops, **{op: run_and_spoil})

    plain = Setting.ops
    monkeypatch.setattr(Setting, "ops", spoiled)
    torch.manual_seed(0)
    assert [r.name for r in SECTIONS["anchors"].parts()[part](setting) if r.passed is False]


@pytest.mark.slow
@pytest.mark.timeout(600)  # starts several processes that import torch
def test_the_whole_check_can_be_rehearsed_on_the_reference(tmp_path):
    words = ["--results", str(tmp_path), "--device", "cpu", "--tiny", "--backend", "reference"]
    lines = []
    check.main([*words, "--sections", "bars,peers,memcheck", "--jobs", "1"], lines.append)
    record = json.loads((tmp_path / "gpu-check-rehearsal.json").read_text())
    assert record["is_complete"]
    assert set(record["sections"]) == {"memcheck", "ceilings", "bars", "peers", "beside"}
    results = {result["name"]: result for result in record["results"]}
    assert set(BARS) <= set(results)
    assert {f"beside/{one.ours}" for one in BESIDE} <= set(results)
    assert [name for name, result in results.items() if result["passed"] is False] == []
    assert all(result["us"] is None for result in results.values())
    absent = [name for name, result in results.items() if "absent" in result["note"]]
    assert all("FlashInfer" in name or "cuDNN" in name for name in absent)
    assert lines[-1].startswith(f"{sum(r['passed'] is True for r in results.values())} passed")


def test_sections_are_chosen_by_name():
    assert check.chosen(None) == list(SECTIONS)
    assert check.chosen("peers,conformance") == ["conformance", "ceilings", "peers"]
    with pytest.raises(SystemExit, match="no section sped"):
        check.chosen("sped")
