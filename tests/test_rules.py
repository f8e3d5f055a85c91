"""The house rules hold in every file, and each rule is seen to fail on what it forbids."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from tests import code_rules
from tests.code_rules import PYTHON_RULES, Source

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
FOLDERS = ("engine", "kernels", "compression", "serving", "bench")
TEXT = {".py", ".cpp", ".h", ".md", ".toml", ".txt", ".proto", ".json", ".in"}
OUR_FILES = ("Makefile", ".ci/run", "setup.py", "pyproject.toml", "README.md", "CMakeLists.txt")


def sources(folders, suffixes):
    """Files that people wrote, by path."""
    paths = {path for folder in folders for path in (ROOT / folder).rglob("*")}
    return [
        Source(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
        for path in sorted(paths)
        if path.suffix in suffixes and not path.stem.endswith(("_pb2", "_pb2_grpc"))
    ]


@pytest.mark.parametrize("rule", PYTHON_RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    package = sources(FOLDERS, {".py"})
    package += [source for source in sources(["src"], {".py"}) if source.path.count("/") == 2]
    assert len(package) > 80
    assert [f"{s.path}: {broken}" for s in package for broken in rule(s)] == []


def test_what_is_left_to_do_has_an_issue():
    files = sources((*FOLDERS, "tests", "docs", "examples"), TEXT)
    files += [Source(name, (ROOT / name).read_text(encoding="utf-8")) for name in OUR_FILES]
    assert [f"{s.path}: {broken}" for s in files for broken in code_rules.open_marks(s)] == []


FORBIDDEN = [
    ("inheritance", "class A(dict): ..."),
    ("inheritance", "class A(ThingMixin): ..."),
    ("inheritance", "class A(Generic[T]): ..."),
    ("type_checking", "from typing import TYPE_CHECKING\nif TYPE_CHECKING: import a"),
    ("type_checking", "import typing\nif typing.TYPE_CHECKING: import a"),
    ("environment", "import os\nos.environ['A']"),
    ("environment", "import os\nos.environ.get('A')"),
    ("environment", "import os\nos.getenv('A')"),
    ("environment", "from os import environ"),
    ("code_from_data", "import pickle"),
    ("code_from_data", "from marshal import loads"),
    ("code_from_data", "torch.load('a')"),
    ("code_from_data", "torch.load('a', weights_only=True)"),
    ("code_from_data", "eval('1')"),
    ("code_from_data", "yaml.load(text)"),
    ("code_from_data", "subprocess.run('ls', shell=True)"),
    ("code_from_data", "np.load('a', allow_pickle=x)"),
    ("code_from_data", "AutoModel.from_pretrained('a', trust_remote_code=True)"),
    ("inner_imports", "def f():\n    import json"),
    ("inner_imports", "async def f():\n    from vivace import LLM"),
    ("inner_imports", "def f():\n    import torch"),
    ("inner_imports", "def f():\n    return import_module('json')"),
    ("run_time_tuning", "import triton\n@triton.autotune([], [])\ndef f(): ..."),
    ("run_time_tuning", "from triton import autotune as a\n@a([], [])\ndef f(): ..."),
    ("run_time_tuning", "from triton.runtime import autotuner\nautotuner.autotune([], [])"),
    ("torch_imports", "import torch.nn"),
    ("torch_imports", "def f():\n    from torch import nn"),
    ("broad_excepts", "try: f()\nexcept: pass"),
    ("broad_excepts", "try: f()\nexcept Exception: pass"),
    ("broad_excepts", "try: f()\nexcept (OSError, BaseException): pass"),
    ("broad_excepts", "try: f()\nexcept Exception as e: raise ValueError from e"),
    ("open_parameters", "def f(**options): ..."),
    ("global_state", "def f():\n    global x\n    x = 1"),
    ("open_marks", "# TO" "DO: later"),
    ("open_marks", "// FIX" "ME"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "text"), FORBIDDEN)
def test_a_rule_finds_what_it_forbids(rule, text):
    assert list(getattr(code_rules, rule)(Source("engine/core.py", text)))


@pytest.mark.parametrize(
    "path",
    ["engine/utils.py", "kernels/common/a.py", "serving/http_helpers.py", "bench/manager.py"],
)
def test_a_vague_module_name_is_found(path):
    assert list(code_rules.vague_modules(Source(path, "")))


ALLOWED = [
    ("inheritance", "engine/a.py", "class A(Protocol): ...\nclass B(msgspec.Struct): ..."),
    ("inheritance", "engine/a.py", "class A(TypedDict, total=False): ..."),
    ("inheritance", "engine/a.py", "class A(ValueError): ...\nclass B(pb.InferenceServicer): ..."),
    ("code_from_data", "engine/a.py", "model.eval()\nsubprocess.run(['ls'], shell=False)"),
    ("inner_imports", "engine/runtimes/onnx.py", "def f():\n    import onnxruntime"),
    ("inner_imports", "serving/cli.py", "def f():\n    from vivace.serving import server"),
    ("inner_imports", "kernels/backend.py", "def f():\n    import_module('a')"),
    ("torch_imports", "kernels/linear/reference.py", "import torch"),
    ("torch_imports", "engine/a.py", "import torchless"),
    ("broad_excepts", "serving/boundary.py", "try: f()\nexcept Exception: pass"),
    ("broad_excepts", "engine/a.py", "try: f()\nexcept (OSError, ValueError): pass"),
    ("broad_excepts", "engine/a.py", "try: f()\nexcept BaseException:\n    g()\n    raise"),
    ("open_parameters", "serving/client/sync.py", "def f(**parameters): ..."),
    ("open_marks", "engine/a.py", "# TO" "DO(#12): later"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_a_rule_passes_what_it_allows(rule, path, text):
    assert list(getattr(code_rules, rule)(Source(path, text))) == []


def test_every_boundary_that_may_catch_everything_exists():
    for path, count in code_rules.BROAD_EXCEPTS.items():
        assert (ROOT / path).read_text(encoding="utf-8").count("except Exception") == count


MANY_STATEMENTS = '"""M."""\n\n\ndef f() -> None:\n    """F."""\n' + "    print()\n" * 41
MANY_BRANCHES = '"""M."""\n\n\ndef f(x: int) -> None:\n    """F."""\n' + "".join(
    f"    if x == {i}:\n        print()\n" for i in range(11)
)
MANY_PARAMETERS = '"""M."""\n\n\ndef f(a=1, b=1, c=1, d=1, e=1, g=1, h=1):\n    """F."""\n'
INNER_IMPORT = '"""M."""\n\n\ndef f():\n    """F."""\n    import json\n\n    print(json)\n'
LINTED = [
    ("engine/a.py", "x = 1\n", "D100"),
    ("engine/a.py", '"""M."""\n\n\ndef f() -> None:\n    print()\n', "D103"),
    ("engine/a.py", '"""M."""\n\n\nclass A:\n    x = 1\n', "D101"),
    ("engine/a.py", '"""M."""\n\ntry:\n    print()\nexcept Exception:\n    print()\n', "BLE001"),
    ("engine/a.py", INNER_IMPORT, "PLC0415"),
    ("engine/a.py", MANY_STATEMENTS, "PLR0915"),
    ("engine/a.py", MANY_BRANCHES, "C901"),
    ("engine/a.py", MANY_PARAMETERS, "PLR0913"),
    ("engine/a.py", f'"""{"x " * 64}x"""\n', "E501"),
    ("engine/a.py", '"""M."""\n\nimport json\n', "F401"),
    ("kernels/linear/cpu.py", MANY_PARAMETERS, None),
    ("tests/test_a.py", "def test_a():\n    print()\n", None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "text", "code"), LINTED)
def test_the_linter_holds_what_the_house_style_says(path, text, code):
    words = [str(BIN / "ruff"), "check", "--no-cache", "--output-format=json", "-"]
    words += ["--stdin-filename", path]
    done = subprocess.run(words, input=text, capture_output=True, text=True, cwd=ROOT, check=False)
    assert {found["code"] for found in json.loads(done.stdout)} == ({code} if code else set())


def contract_modules():
    """Every module that the import contracts name."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    names = [name for c in contracts for v in c.values() if isinstance(v, list) for name in v]
    return {part for name in names for part in name.split(" | ") if part.startswith("vivace")}


UPWARD = [
    ("kernels", "import vivace.engine", False),
    ("engine", "import vivace.serving", False),
    ("serving", "import vivace.compression", False),
    ("compression", "import vivace.bench", False),
    ("engine", "import torch", False),
    ("serving", "import torch", False),
    ("bench", "import vivace.serving", True),
]


@pytest.mark.parametrize(("folder", "text", "passes"), UPWARD)
def test_an_import_that_points_up_is_found(tmp_path, folder, text, passes):
    for module in contract_modules():
        package = tmp_path.joinpath(*module.split("."))
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
    (tmp_path / "vivace" / "__init__.py").touch()
    (tmp_path / "vivace" / folder / "__init__.py").write_text(text + "\n")
    lint = (
        "import sys; from importlinter.cli import lint_imports; sys.path.insert(0, sys.argv[2]);"
        "sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    )
    words = [sys.executable, "-c", lint, str(ROOT / "pyproject.toml"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    assert (done.returncode == 0) == passes


def test_the_linters_see_every_module():
    graph = "import grimp; print(*grimp.build_graph('vivace', cache_dir=None).modules)"
    words = [sys.executable, "-c", graph]
    seen = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()
    for source in sources(FOLDERS, {".py"}):
        module = source.path.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
        assert f"vivace.{module}" in seen


def test_every_folder_is_linked_into_the_package():
    links = {p.name: str(p.readlink()) for p in (ROOT / "src/vivace").iterdir() if p.is_symlink()}
    assert links == {name: f"../../{name}" for name in FOLDERS}


def test_memory_that_nobody_wrote_is_not_a_number():
    assert torch.empty(5).isnan().all()
    assert torch.empty_like(torch.zeros(5)).isnan().all()
    assert torch.zeros(1).new_empty(5).isnan().all()
    assert (torch.empty(5, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
