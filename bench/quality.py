"""What quantizing a model costs in perplexity: by its weights alone, and with its activations of 8 bits; and by its cache."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vivace.bench.result import Figure, figure
from vivace.engine.config import CacheConfig, Config, KvDType, WeightsConfig
from vivace.engine.errors import ConfigError
from vivace.engine.evaluate import perplexity
from vivace.engine.llm import LLM
from vivace.engine.models import weights
from vivace.engine.models.architecture import read_architecture
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.program import Kind, Value, values_of
from vivace.engine.models.quantize import Quantize
from vivace.engine.plan import program_of
from vivace.kernels.quantized import GROUPS, quantize_int4, quantize_int8

Array = np.ndarray[Any, Any]
Rows = Sequence[Sequence[int]]


def measure(model: Path, rows: Rows) -> list[Figure]:
    """Perplexities, and by how many per cent each is above that of the weights in fp32."""
    plain = perplexity(LLM(model).core, rows)
    small_cache = Config(model=model, cache=CacheConfig(dtype=KvDType.INT8))
    with_small_cache = perplexity(LLM(model, config=small_cache).core, rows)
    figures = [
        figure("fp32, perplexity", [plain]),
        figure("fp32 with an int8 cache, perplexity", [with_small_cache]),
        figure("fp32 with an int8 cache, above fp32, %", [_above(with_small_cache, plain)]),
    ]
    for name, settings in _ways():
        config = Config(model=model, weights=settings)
        whole = perplexity(LLM(model, config=config).core, rows)
        with tempfile.TemporaryDirectory(prefix="vivace-") as directory:
            by_weights = perplexity(LLM(_rounded(config, Path(directory))).core, rows)
        figures += [
            figure(f"{name}, perplexity", [whole]),
            figure(f"{name}, above fp32, %", [_above(whole, plain)]),
            figure(f"{name}, of it by weights, %", [_above(by_weights, plain)]),
            figure(f"{name}, added by activations, %", [_above(whole, by_weights)]),
        ]
    return figures


def read_rows(path: Path, kind: str | None) -> Rows:
    """Lines of JSON with `prompt_ids` and `greedy_ids`, which follow them; of one `kind`, if one is named."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [x["prompt_ids"] + x["greedy_ids"] for x in lines if kind in (None, x.get("kind"))]
    if not rows:
        raise ConfigError(f"{path} has no row of kind {kind!r}")
    return rows


def _ways() -> Iterator[tuple[str, WeightsConfig]]:
    yield "int8", WeightsConfig(quantize=Quantize.INT8)
    for group in GROUPS:
        yield f"int4 g{group}", WeightsConfig(quantize=Quantize.INT4, group=group)


def _above(one: float, other: float) -> float:
    return 100 * (one / other - 1)


def _rounded(config: Config, directory: Path) -> Path:
    """The same checkpoint in fp32, each number what rounding makes of it."""
    spec = read_spec(config.model)
    names = read_architecture(spec.architecture)
    stored = weights.open_checkpoint(config.model)
    tensors = {}
    for value in values_of(program_of(config, spec)):
        if value.kind is Kind.WEIGHT:
            for piece in weights.pieces_of(value, names):
                one = replace(value, shape=piece.shape, plus=0.0)
                alone = replace(piece, place=(), transposed=False, interleaved=False)
                array = weights.joined(one, [alone], stored)
                if value.is_quantized:
                    array = _nearest(value, array, is_transposed=piece.transposed)
                tensors[piece.tensor] = array
    save_file(tensors, directory / "model.safetensors")
    for file in config.model.glob("*.json"):
        if not file.name.startswith("model."):
            shutil.copy(file, directory)
    return directory


def _nearest(value: Value, stored: Array, *, is_transposed: bool) -> Array:
    w = np.swapaxes(stored, -1, -2) if is_transposed else stored
    rounded = quantize_int8(w) if value.group is None else quantize_int4(w, value.group)
    found = rounded.dequantized()
    return np.ascontiguousarray(np.swapaxes(found, -1, -2)) if is_transposed else found
