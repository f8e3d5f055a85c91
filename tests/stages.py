"""Runs the stages of `make check` and `make test` in order up to the first that fails, and prints their times."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CODE = ("engine", "kernels", "serving", "bench", "compression")
PARTS = {  # stage of `test` -> what pytest runs in it
    "engine": ["tests/engine"],
    "serving": ["tests/serving"],
    "kernels": ["tests/kernels"],
    "rest": ["tests", *(f"--ignore=tests/{name}" for name in ("engine", "serving", "kernels"))],
}

SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}  # folder of build/ -> gcc's names


def run(*words: str, **variables: str) -> None:
    """Run a command of the environment in the root, with variables set. Raises CalledProcessError."""
    environment = os.environ | variables
    subprocess.run([str(BIN / words[0]), *words[1:]], cwd=ROOT, check=True, env=environment)


def lint() -> None:
    """Style, format, layers."""
    run("ruff", "check", ".")
    run("ruff", "format", "--check", ".")
    run("lint-imports")


def types() -> None:
    """mypy, strict; the client as code of others sees it, too."""
    run("mypy")
    run("mypy", "tests/serving/clients/typed.py")


def fast() -> None:
    """Every test that is not marked slow; Triton's interpreter is."""
    run("pytest", "-q", "-n", "2", "-m", "not slow and not triton")


def part(name: str) -> Callable[[], None]:
    """All tests of one part of the tree, but those that interpret Triton kernels."""
    return lambda: run("pytest", "-q", "-n", "2", "-m", "not triton", *PARTS[name])


def triton() -> None:
    """Every test that interprets Triton kernels."""
    run("pytest", "-q", "-n", "2", "-m", "triton", "tests")


def aot() -> None:
    """Every test that compiles Triton kernels, for GPUs that are not there: what ships, cold, and what is wrong with it."""
    words = ("pytest", "-q", "-n", "2", "--dist", "worksteal", "--timeout", "900", "-m", "aot")
    run(*words, "tests/aot", TRITON_INTERPRET="0")


def sanitize() -> None:
    """The C++ library's own test, without Python, under ASan with UBSan and under TSan."""
    cmake = shutil.which("cmake") or str(BIN / "cmake")
    for name, sanitizers in SANITIZERS.items():
        build = ROOT / "build" / name
        options = {
            "CMAKE_BUILD_TYPE": "RelWithDebInfo",
            "CMAKE_CXX_FLAGS": f"-fsanitize={sanitizers} -fno-sanitize-recover=all",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(build),
            "VIVACE_CPU_TEST": "ON",
        }
        words = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *words], check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", "2"], check=True)
        subprocess.run([str(build / "cpu_test")], check=True)


def package() -> None:
    """Wheel and sdist, installed in an empty environment; the model that ships answers there, without torch."""
    out = ROOT / "build" / "package"
    shutil.rmtree(out, ignore_errors=True)
    run("python", "-m", "build", "--outdir", str(out / "dist"), str(ROOT))
    check_wheel(*(out / "dist").glob("*.whl"))
    for kind in ("*.whl", "*.tar.gz"):
        [made] = (out / "dist").glob(kind)
        venv = out / f"venv-{made.suffix[1:]}"
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        constraints = str(ROOT / "constraints.txt")
        pip = [str(venv / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", constraints, str(made)], cwd=out, check=True)
        model = str(ROOT / "examples" / "northstar")
        subprocess.run([str(venv / "bin" / "vivace"), "info", model], cwd=out, check=True)
        subprocess.run([str(venv / "bin" / "python"), "-c", ONE_TOKEN, model], cwd=out, check=True)
    check_client_alone(out, model, constraints)


def check_client_alone(out: Path, model: str, constraints: str) -> None:
    """The wheel without what it depends on, beside grpcio and protobuf: its client talks to a server of this environment."""
    [wheel] = (out / "dist").glob("*.whl")
    venv = out / "venv-client"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", constraints, "grpcio", "protobuf"], cwd=out, check=True)
    subprocess.run([*pip, "--no-deps", str(wheel)], cwd=out, check=True)
    command = [str(BIN / "vivace"), "serve", model, "--port", "0"]
    with subprocess.Popen(command, cwd=out, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            target = server.stdout.readline().split()[-1]  # printed once the model is loaded
            words = [str(venv / "bin" / "python"), "-I", "-c", CLIENT_ALONE, target]
            subprocess.run(words, cwd=out, check=True)
        finally:
            server.terminate()


def check_wheel(wheel: Path) -> None:
    """Raise RuntimeError unless the wheel holds all that lies in the folders (but results), and one library."""
    names = set(zipfile.ZipFile(wheel).namelist())
    suffixes = (".py", ".pyi", ".json", ".toml", ".proto")
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*")]
    files = [path for path in files if not path.is_relative_to(ROOT / "bench" / "results")]
    wanted = {f"vivace/{path.relative_to(ROOT)}" for path in files if path.suffix in suffixes}
    wanted |= {"vivace/__main__.py", "vivace/py.typed", "vivace/kernels/libvivace_cpu.so"}
    if "-py3-none-" not in wheel.name or not wanted <= names:
        raise RuntimeError(f"{wheel.name} lacks {sorted(wanted - names)}")


ONE_TOKEN = """
import sys
from vivace import LLM, SamplingParams
[result] = LLM(sys.argv[1]).generate(["Hello"], SamplingParams(max_tokens=1))
assert len(result.outputs[0].token_ids) == 1 and "torch" not in sys.modules
"""

CLIENT_ALONE = """
import sys
from importlib.metadata import distributions
from vivace.serving.client import Client
installed = {one.metadata["Name"] for one in distributions()} - {"pip", "setuptools"}
assert installed == {"grpcio", "protobuf", "typing_extensions", "vivace"}, installed
messages = [{"role": "user", "content": "How many days does delivery take?"}]
with Client(sys.argv[1], timeout=60) as client:
    text = "".join(event.text for event in client.chat(messages, temperature=0))
    assert text and client.complete_chat(messages, temperature=0).text == text
"""


def main(names: list[str]) -> int:
    """Run the named stages; returns the exit status."""
    stages: dict[str, Callable[[], None]] = {"lint": lint, "types": types, "fast": fast}
    stages |= {name: part(name) for name in PARTS}
    stages |= {"triton": triton, "aot": aot, "sanitize": sanitize, "package": package}
    wanted = [
        one for name in names for one in ((*PARTS, "triton", "aot") if name == "all" else (name,))
    ]
    times: list[tuple[str, float, str]] = []
    failed = False
    for name in wanted:
        start = time.monotonic()
        try:
            stages[name]()
        except (subprocess.CalledProcessError, RuntimeError) as error:
            print(error)
            failed = True
        times.append((name, time.monotonic() - start, "failed" if failed else "ok"))
        if failed:
            break
    for name, seconds, outcome in times:
        print(f"{name:12s}{seconds:8.1f} s  {outcome}")
    print(f"{'in all':12s}{sum(seconds for _, seconds, _ in times):8.1f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
