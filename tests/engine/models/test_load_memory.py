"""Loading takes little more memory than the weights themselves: pages of the file are given back as they are used."""

import json
import subprocess
import sys
from math import prod

import numpy as np
import pytest

from vivace.engine.models.architecture import read_architecture
from vivace.engine.models.decoder import emit
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.program import Kind, sized, values_of
from vivace.engine.models.weights import pieces_of

LEAST_BYTES = 500_000_000
CONFIG = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 128,
}
MOE = CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 5,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1024,
    "intermediate_size": 1024,
}
DENSE = CONFIG | {"architectures": ["LlamaForCausalLM"], "intermediate_size": 4096}
WIDE = CONFIG | {"architectures": ["LlamaForCausalLM"], "intermediate_size": 1024}
CASES = {  # config, dtype, shards
    "bf16 experts in shards": (MOE, "BF16", 3),
    "fp16 in one file": (DENSE | {"num_hidden_layers": 17}, "F16", 1),
    "fp32 in shards": (DENSE | {"num_hidden_layers": 9}, "F32", 2),
    "large vocabulary": (WIDE | {"num_hidden_layers": 2, "vocab_size": 1 << 17}, "BF16", 1),
    "tied and stored": (
        WIDE | {"num_hidden_layers": 2, "vocab_size": 1 << 18, "tie_word_embeddings": True},
        "F16",
        1,
    ),
}
LOAD = """
import json, sys
from pathlib import Path
from vivace.engine.models import weights
from vivace.engine.models.architecture import read_architecture
from vivace.engine.models.decoder import emit
from vivace.engine.models.hf_config import read_spec

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

directory = Path(sys.argv[1])
spec = read_spec(directory)
program = emit(spec)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
loaded = weights.load(directory, program, spec.architecture, lambda done, total: None)
total = float(sum(array.sum(dtype="float64") for array in loaded.values()))  # reads every page
peak = status("VmHWM")
print(json.dumps([peak - before, sum(a.nbytes for a in loaded.values()), total]))
"""


def write_checkpoint(directory, config, dtype, shards):
    """Random weights, tensor by tensor, without holding them. Returns the bytes written."""
    (directory / "config.json").write_text(json.dumps(config))
    program = emit(read_spec(directory))
    names = read_architecture(config["architectures"][0])
    shapes = {
        piece.tensor: piece.shape
        for value in values_of(program)
        if value.kind is Kind.WEIGHT and sized(value.shape, {})
        for piece in pieces_of(value, names)
    }
    if config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    itemsize = 4 if dtype == "F32" else 2
    weight_map, total = {}, 0
    for shard in range(shards):
        part = {
            name: shape for i, (name, shape) in enumerate(shapes.items()) if i % shards == shard
        }
        file = f"model-{shard}.safetensors" if shards > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(part, file)
        total += _write_file(directory / file, part, dtype, itemsize)
    if shards > 1:
        index = {"weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_file(path, shapes, dtype, itemsize):
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Exponents of small numbers in the upper byte, whichever of the three types it is.
    noise = np.random.default_rng(0).integers(0, 60, 1 << 24, np.uint8).tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():  # anew for each tensor: those of one shape are equal
            for left in range(prod(shape) * itemsize, 0, -len(noise)):
                file.write(noise[: min(left, len(noise))])
    return end


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_loading_is_little_more_than_the_weights(tmp_path, case):
    config, dtype, shards = CASES[case]
    assert write_checkpoint(tmp_path, config, dtype, shards) >= LEAST_BYTES
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    grown, kept, total = json.loads(done.stdout)
    print(f"{grown / kept:.3f} of the weights")
    assert kept >= LEAST_BYTES
    assert grown <= 1.15 * kept
    assert np.isfinite(total)
