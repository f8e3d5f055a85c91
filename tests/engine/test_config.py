"""The tree of settings: how it is asked for, what it refuses, and that what it prints can be read back."""

import argparse
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from vivace.engine.config import (
    CacheConfig,
    CpuConfig,
    GpuConfig,
    KvDType,
    SchedulerConfig,
    ServeConfig,
    ServerConfig,
    SparseConfig,
    WeightsConfig,
)
from vivace.engine.config_file import FLAGS, add_flags, from_tables, from_words, to_toml
from vivace.engine.errors import ConfigError
from vivace.engine.models.quantize import Quantize
from vivace.kernels.backend import Backend

FILE = """
max_context_tokens = 1024
[scheduler]
max_running = 3
max_waiting = 5
[server]
port = 7
drain_s = 2
[models]
one = "folders/one"
"the other" = "folders/two"
"""


@pytest.fixture
def read(tmp_path):
    """The tree of some words; `file` is the text of a file that is named first."""

    def read(*words, file=None):
        parser = argparse.ArgumentParser()
        add_flags(parser)
        if file is not None:
            (tmp_path / "vivace.toml").write_text(file, encoding="utf-8")
            words = ("--config", str(tmp_path / "vivace.toml"), *words)
        return from_words(parser.parse_args(words))

    return read


def settings(kind=ServeConfig, prefix=""):
    """Every setting's path and field."""
    for one in fields(kind):
        if is_dataclass(one.type):
            yield from settings(one.type, f"{prefix}{one.name}.")
        elif one.name != "models":
            yield f"{prefix}{one.name}", one


def test_no_words_give_the_defaults(read):
    assert read() == ServeConfig()


def test_a_file_sets_what_it_names_and_nothing_else(read):
    assert read(file=FILE) == ServeConfig(
        max_context_tokens=1024,
        scheduler=SchedulerConfig(max_running=3, max_waiting=5),
        server=ServerConfig(port=7, drain_s=2),
        models={"one": Path("folders/one"), "the other": Path("folders/two")},
    )


def test_the_later_word_wins_file_then_set_then_flag(read):
    words = ("--max-running", "9", "--set", "scheduler.max_running=8", "--set", "server.port=8")
    got = read(*words, "--set", "server.port=9", file=FILE)
    assert got.scheduler == SchedulerConfig(max_running=9, max_waiting=5)
    assert (got.server.port, got.server.drain_s) == (9, 2)


@pytest.mark.parametrize(
    ("word", "path", "want"),
    [
        ("backend=reference", "backend", Backend.REFERENCE),
        ("cpu.isa=portable", "cpu.isa", "portable"),
        ('cpu.isa="portable"', "cpu.isa", "portable"),
        ("cache.prefix_sharing=false", "cache.prefix_sharing", False),
        ("cache.verify_hits=true", "cache.verify_hits", True),
        ("cache.dtype=int8", "cache.dtype", KvDType.INT8),
        ("cache.memory_bytes=512MiB", "cache.memory_bytes", 512 << 20),
        ("weights.quantize=int4", "weights.quantize", Quantize.INT4),
        ("weights.group=64", "weights.group", 64),
        ("weights.cache_dir=x y", "weights.cache_dir", Path("x y")),
        ("cache.memory_bytes=1_000", "cache.memory_bytes", 1000),
        ("server.drain_s=0.5", "server.drain_s", 0.5),
        ("server.host=::1", "server.host", "::1"),
        ("scheduler={max_running=2}", "scheduler.max_running", 2),
        ("models.a.b=x y", "models", {"a.b": Path("x y")}),
    ],
)
def test_a_value_is_toml_and_a_bare_word_a_text(read, word, path, want):
    got = read("--set", word)
    for part in path.split("."):
        got = getattr(got, part)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(("flag", "path"), FLAGS.items())
def test_every_flag_is_a_setting(read, flag, path):
    one = dict(settings())[path]
    texts = {"host": "::1", "backend": "reference", "quantize": "int8", "cache-dir": "a/b"}
    texts |= {"kv-cache-dtype": "bf16", "device": "cuda"}
    value = texts.get(flag, "11")
    words = (f"--{flag}",) if one.type is bool else (f"--{flag}", value)
    value = "true" if one.type is bool else value
    where = ("--set", "backend=triton") if path.startswith("gpu.") else ()
    assert read(*words, *where) == read("--set", f"{path}={value}", *where) != read(*where)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("scheduler.max_runing=3", r"scheduler\.max_runing \(3\) is no setting; there are .*max_running"),
        ("nothing=3", r"nothing \(3\) is no setting; there are backend, .*models"),
        ("scheduler=3", r"scheduler must be a table of settings, got 3"),
        ("scheduler.max_running=many", r"scheduler\.max_running must be a whole number of at least 1, got 'many'"),
        ("scheduler.max_running=0", r"scheduler\.max_running .* at least 1, got 0"),
        ("scheduler.max_running=2.0", r"scheduler\.max_running .* got 2\.0"),
        ("scheduler.max_running=true", r"scheduler\.max_running .* got True"),
        ("scheduler.max_running=1000", r"max_step_tokens \(512\) must be at least scheduler\.max_running \(1000\)"),
        ("cache.prefix_sharing=1", r"cache\.prefix_sharing must be true or false, got 1"),
        ("cache.memory_bytes=1MB", r"cache\.memory_bytes must be .*'512MiB'.* got '1MB'"),
        ("cache.memory_bytes=0MiB", r"cache\.memory_bytes .* at least 1, got 0"),
        ("max_context_tokens=1", r"max_context_tokens .* at least 2, got 1"),
        ("cpu.isa=3", r"cpu\.isa must be a text, got 3"),
        ("cpu.threads=0", r"cpu\.threads must be a whole number in 1\.\.1024, got 0"),
        ("cpu.threads=1025", r"cpu\.threads must be a whole number in 1\.\.1024, got 1025"),
        ("weights.cache_dir=3", r"weights\.cache_dir must be the path of a folder, got 3"),
        ('weights.cache_dir=""', r"weights\.cache_dir must be the path of a folder, got ''"),
        ("weights.quantize=int5", r"weights\.quantize must be 'none' or 'int8' or 'int4', got 'int5'"),
        ("weights.group=16", r"weights\.group must be 32, 64 or 128, got 16"),
        ("backend=gpu", r"backend must be 'reference' or 'cpu' or 'triton', got 'gpu'"),
        ("gpu={strict_jit=true}", r"gpu\.\* is of backend 'triton', got .*strict_jit=True"),
        ("server.port=65536", r"server\.port .* in 0\.\.65535, got 65536"),
        ("server.drain_s=nan", r"server\.drain_s must be a number of at least 0, got nan"),
        ("server.host=example", r"server\.host must be an IP address, got 'example'"),
        ("server.host=0.0.0.0", r"server\.host 0\.0\.0\.0 can be reached from the network"),
        ("server.max_message_bytes=2GiB", r"max_message_bytes .* in 1024\.\.2147483647"),
        ("models=x", r"models must be a table, name = folder, got 'x'"),
        ("models.a=3", r"models\.a must be the path of a folder, got 3"),
        ("models.a=[1", r"not a TOML value: '\[1'"),
        ("models.a=1\nb=2", r"one value, not several lines"),
        ("models.a", r"--set must be KEY=VALUE, got 'models\.a'"),
        ("=3", r"--set must be KEY=VALUE"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_refused_with_name_value_and_what_is_allowed(read, words, text):
    with pytest.raises(ConfigError, match=text):
        read("--set", words)


def test_a_cpu_setting_is_refused_with_another_backend(read):
    with pytest.raises(ConfigError, match=r"cpu\.threads and cpu\.isa are of backend 'cpu'"):
        read("--backend", "reference", "--threads", "2")
    with pytest.raises(ConfigError, match=r"weights\.cache_dir is of backend 'cpu', got a with"):
        read("--backend", "reference", "--cache-dir", "a")
    with pytest.raises(ConfigError, match="got ''"):
        ServeConfig(models={"": Path("x")})
    with pytest.raises(ConfigError, match=r"models\.a must be the path"):
        ServeConfig(models={"a": "x"})


def test_a_file_that_is_no_toml_is_named(read, tmp_path):
    with pytest.raises(ConfigError, match=r"vivace\.toml: not valid TOML: .*line 2"):
        read(file="[models]\na = 1 2\n")
    with pytest.raises(ConfigError, match="not valid TOML"):  # a name twice
        read(file='[models]\na = "x"\na = "y"\n')
    with pytest.raises(FileNotFoundError):
        read("--config", str(tmp_path / "absent.toml"))


def test_models_of_the_command_line_are_named_and_stand_for_the_files(read):
    got = read("x/one", "x/two", "--name", "a", "--name", "b", file=FILE)
    assert got.models == {"a": Path("x/one"), "b": Path("x/two")}
    assert read("x/one", "y/two").models == {"one": Path("x/one"), "two": Path("y/two")}
    with pytest.raises(ConfigError, match=r"'one' for x/one and y/one; give each one with --name"):
        read("x/one", "y/one")
    with pytest.raises(ConfigError, match="different names, got 'a'"):
        read("x/one", "y/two", "--name", "a", "--name", "a")
    with pytest.raises(ConfigError, match="got 1 for 2"):
        read("x/one", "y/two", "--name", "a")
    with pytest.raises(ConfigError, match="got 1 for 0"):
        read("--name", "a", file=FILE)


def test_every_engine_gets_the_settings_of_all(read):
    got = read("--threads", "3", "--max-context", "99", file=FILE)
    for name in ("one", "the other"):
        engine = got.engine(name)
        assert engine.model == got.models[name]
        for one in fields(engine):
            if one.name != "model":
                assert getattr(engine, one.name) == getattr(got, one.name)


OTHERS = ServeConfig(
    backend=Backend.REFERENCE,
    device='cu"da\\:\n1\x7f',
    max_context_tokens=77,
    scheduler=SchedulerConfig(max_step_tokens=99, max_running=3, max_waiting=4),
    cache=CacheConfig(
        dtype=KvDType.BF16,
        block_tokens=8,
        memory_bytes=12345,
        prefix_sharing=False,
        verify_hits=True,
    ),
    server=ServerConfig(
        host="::",
        port=0,
        insecure=True,
        drain_s=0.25,
        stalled_reader_s=1e22,
        max_message_bytes=1 << 20,
        max_metadata_bytes=2000,
        max_concurrent_streams=7,
    ),
    weights=WeightsConfig(quantize=Quantize.INT4, group=32),
    sparse=SparseConfig(
        budget_tokens=4096,
        min_context=0,
        layers_dense=0,
        min_kept_mass=0.75,
        measure_every=7,
    ),
    models={"a": Path("x"), 'b "ü".c': Path("y z")},
)
OF_THE_CPU = ServeConfig(
    cpu=CpuConfig(threads=3, isa="x"), weights=WeightsConfig(cache_dir=Path("a b"))
)

OF_A_GPU = ServeConfig(
    device="cuda:1", gpu=GpuConfig(kernel_cache_dir=Path("a b"), strict_jit=True)
)


@pytest.mark.parametrize("tree", [ServeConfig(), OTHERS, OF_THE_CPU, OF_A_GPU])
def test_what_is_printed_is_read_back_as_the_same_tree(tree):
    text = to_toml(tree, {"a": ["plan: some"]})
    assert from_tables(tomllib.loads(text)) == tree
    assert ("#   plan: some" in text) == ("a" in tree.models)


def test_every_setting_is_printed_with_its_meaning_and_its_flag():
    text = to_toml(ServeConfig(), {})
    found = dict(settings())
    assert 15 < len(found) <= 80
    for path, one in found.items():
        name = path.split(".")[-1]
        [line] = [x for x in text.splitlines() if x.startswith((f"{name} =", f"# {name} ="))]
        assert one.metadata["about"] in line
        assert ("unset" if one.default is None else "default") in line
        flags = [f"(--{flag})" for flag, of in FLAGS.items() if of == path]
        assert all(flag in line for flag in flags)


def test_the_tests_above_change_every_setting():
    """Else a setting that is not written, or not read, would go unnoticed."""
    for path, one in settings():
        is_of_the_cpu = path.startswith("cpu.") or path == "weights.cache_dir"
        value = OF_THE_CPU if is_of_the_cpu else OF_A_GPU if path.startswith("gpu.") else OTHERS
        for part in path.split("."):
            value = getattr(value, part)
        assert value != one.default, path


@pytest.mark.parametrize(
    ("words", "backend"),
    [
        ((), Backend.CPU),
        (("--device", "cuda"), Backend.TRITON),
        (("--device", "cuda:1", "--backend", "reference"), Backend.REFERENCE),
        (("--backend", "triton"), Backend.TRITON),
    ],
)
def test_the_backend_is_the_device_s_where_it_is_not_said(read, words, backend):
    assert read("m", *words).engine("m").runs_on is backend


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ("--device", "cuda", "--backend", "cpu"),
            "device must be 'cpu' with backend 'cpu', got 'cuda'",
        ),
        (
            ("--device", "cuda", "--quantize", "int8"),
            "quantize must be 'none' with backend 'triton', got 'int8'",
        ),
        (("--device", "cuda", "--threads", "3"), "cpu.threads and cpu.isa are of backend 'cpu'"),
        (
            ("--device", "cuda", "--cache-dir", "a"),
            "weights.cache_dir is of backend 'cpu', got a with backend 'triton'",
        ),
    ],
)
def test_settings_of_another_backend_are_refused(read, words, text):
    with pytest.raises(ConfigError, match=text):
        read(*words)
