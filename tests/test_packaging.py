"""What users install: the command, the package's names, and that every version is pinned."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vivace
from vivace.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]


def run(*words):
    """Run Python in a process of its own."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def project():
    """The metadata as the repository has it, not as something installed it."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def pins():
    """Package -> version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def closure(requirements):
    """Every installed package that these bring here, by name."""
    found, rest = {}, [(Requirement(text), "") for text in requirements]
    while rest:
        requirement, extra = rest.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        wanted = {name, *(f"{name}[{one}]" for one in requirement.extras)} - found.keys()
        found |= dict.fromkeys(wanted, requirement)
        if wanted:
            needs = [Requirement(text) for text in metadata.requires(name) or ()]
            rest += [(need, one) for need in needs for one in ("", *requirement.extras)]
    return {name for name in found if "[" not in name}


def test_the_version_is_one():
    assert vivace.__version__ == project()["version"]


def test_every_package_that_gets_installed_is_pinned():
    listed = project()["dependencies"] + project()["optional-dependencies"]["test"]
    needed = closure(listed)
    assert {"numpy", "grpcio", "torch", "pytest", "huggingface-hub"} <= needed
    assert needed - pins().keys() == set()


def test_what_is_installed_is_what_is_pinned():
    pinned = pins()
    listed = project()["dependencies"] + project()["optional-dependencies"]["test"]
    installed = {name: metadata.version(name).split("+")[0] for name in closure(listed)}
    assert installed == {name: pinned[name] for name in installed}


def test_every_pin_lies_in_the_range_that_users_may_install():
    pinned = pins()
    listed = project()["dependencies"] + project()["optional-dependencies"]["test"]
    for requirement in map(Requirement, listed):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_the_base_install_has_no_torch():
    base = closure(project()["dependencies"])
    assert "numpy" in base
    assert base & {"torch", "triton", "transformers", "pytest"} == set()


def test_generated_code_is_no_newer_than_the_grpc_that_runs_it():
    text = (ROOT / "serving/protos/vivace/v1/inference_pb2_grpc.py").read_text()
    [made_by] = re.findall(r"GRPC_GENERATED_VERSION = '([\d.]+)'", text)
    [least] = [Requirement(t) for t in project()["dependencies"] if t.startswith("grpcio>")]
    assert least.specifier.contains(made_by)
    assert not least.specifier.contains("1.0")


def test_the_package_names_its_two_classes_only_when_asked():
    code = "import sys, vivace; assert 'numpy' not in sys.modules; print(vivace.SamplingParams)"
    done = run("-c", code)
    assert "vivace.engine.sampling.SamplingParams" in done.stdout, done.stderr
    assert vivace.LLM.__module__ == "vivace.engine.llm"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = vivace.Nothing


def test_help_is_quick_because_it_imports_no_command():
    code = (
        "import sys; from vivace.__main__ import main; sys.argv = ['vivace', '--help'];"
        "assert main() == 0; heavy = {'numpy', 'grpc', 'argparse', 'msgspec'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_names_it(command, capsys):
    with pytest.raises(SystemExit) as ended:
        import_module(COMMANDS[command][0]).main(command, ["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: vivace {command}")


def test_the_version_is_printed():
    assert run("-m", "vivace", "--version").stdout == f"vivace {vivace.__version__}\n"


def test_an_unknown_command_is_named_and_ends_with_2():
    done = run("-m", "vivace", "sing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vivace: error: no command 'sing'")


def test_no_command_shows_the_usage_and_ends_with_2():
    done = run("-m", "vivace")
    assert done.returncode == 2
    assert done.stdout.startswith("usage: vivace")


def test_an_error_is_one_line_without_a_traceback(tmp_path):
    done = run("-m", "vivace", "info", str(tmp_path / "nothing"))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"vivace: error: .*nothing.*\n", done.stderr)
