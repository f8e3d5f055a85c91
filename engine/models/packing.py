"""A checkpoint to the weights of a quantized program, all in one piece of memory: rounded and packed block by block, or as an
earlier start left them in a file.

Decides where each weight lies, and which checkpoint a file is of. No matrix is ever whole in fp32, but one that stays so.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vivace.engine.errors import ArtifactError
from vivace.engine.models import packed_cache, weights
from vivace.engine.models.architecture import read_architecture
from vivace.engine.models.packed_cache import Unusable
from vivace.engine.models.program import (
    Kind,
    Program,
    Value,
    num_experts,
    sized,
    values_of,
    weight_bytes,
)
from vivace.engine.models.weights import Strip
from vivace.kernels.memory.cpu import HUGE_BYTES, CpuMemory, PackedMatrix, huge
from vivace.kernels.quantized import LAYOUT, TILE

Array = np.ndarray[Any, Any]

VERSION = 1  # of the order of the weights in a file, and of what `key_of` looks at
ALIGNMENT = 64
BLOCK_BYTES = 1 << 20  # of fp32 that are rounded at a time: they stay in the CPU's caches
SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Work:
    """How the weights are made ready."""

    threads: int
    cache: Path | None  # folder of files
    progress: weights.Progress


def load(
    directory: Path, program: Program, architecture: str, *, memory: CpuMemory, work: Work
) -> tuple[dict[str, Array | PackedMatrix], str]:
    """The weights by name, arrays in fp32 and packed buffers, and where they come from, in a line.

    Raises ArtifactError for a bad checkpoint. A file of an earlier start that cannot be used is written anew; one that
    cannot be written is done without.
    """
    places, num_bytes = arrange(program)
    if work.cache is None:
        data = _round(directory, program, architecture, memory=memory, work=work)
        how = "rounded from the checkpoint"
    else:
        key = key_of(directory, program, architecture)
        file = file_of(directory, program, work.cache)
        try:
            data, how = packed_cache.read(file, key, num_bytes, threads=work.threads)
            work.progress(num_bytes, num_bytes)
        except (Unusable, OSError) as error:
            data = _round(directory, program, architecture, memory=memory, work=work)
            is_same = key == key_of(directory, program, architecture)
            kept = (
                _keep(file, key, data, work.threads)
                if is_same
                else "not kept: it changed meanwhile"
            )
            why = "" if isinstance(error, FileNotFoundError) else f" ({file.name}: {error})"
            how = f"rounded from the checkpoint, {kept}{why}"
    found = {value.name: _kept(value, data[place], memory) for value, place in places.items()}
    return found, how


def arrange(program: Program) -> tuple[dict[Value, slice], int]:
    """Where each weight lies, and the bytes of all."""
    places: dict[Value, slice] = {}
    end = 0
    for value in values_of(program):
        if value.kind is Kind.WEIGHT:
            places[value] = slice(end, end + weight_bytes(value))
            end = -(-places[value].stop // ALIGNMENT) * ALIGNMENT
    return places, -(-end // HUGE_BYTES) * HUGE_BYTES


def file_of(directory: Path, program: Program, cache: Path) -> Path:
    """The one file of a folder and a way to quantize it, so that a checkpoint that changes leaves none behind."""
    whole = directory.resolve()
    kinds = {(v.dtype.value, v.group) for v in values_of(program) if v.kind is Kind.WEIGHT}
    told = repr((str(whole), sorted(kinds, key=repr)))
    return cache / f"{whole.name[:64]}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.packed"


def key_of(directory: Path, program: Program, architecture: str) -> bytes:
    """What decides every byte of the packed weights: their layout, and which checkpoint it is.

    No hash of all of it, which would take longer than to round it: for each file what the kernel says of it, the time of its
    last change included, which no program can set; for each tensor its header and a sample. See docs/decisions/0010.
    """
    names = read_architecture(architecture)
    found = hashlib.sha256(repr((VERSION, LAYOUT)).encode())
    # First the files, then what they hold: one that is replaced in between fits neither.
    for path in sorted(directory.glob("*.safetensors*")):
        status = path.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        found.update(repr((path.name, status.st_size, status.st_ino, *times)).encode())
    for value in arrange(program)[0]:
        found.update(repr((value, weights.pieces_of(value, names))).encode())
    for tensor in weights.open_checkpoint(directory).values():
        file = Path(tensor.file).name  # the folder may be called by another path next time
        place = tensor.name, file, tensor.dtype, tensor.shape, tensor.start
        found.update(repr(place).encode())
        raw = tensor.raw()
        found.update(raw[len(raw) // 2 :][:SAMPLE_BYTES].tobytes())
        tensor.let_go(raw)
    return found.digest()


def _keep(file: Path, key: bytes, data: Array, threads: int) -> str:
    try:
        packed_cache.write(file, key, data, threads=threads)
    except OSError as error:
        return f"not kept in {file.parent}: {error.strerror or error}"
    return f"kept in {file}"


def _round(
    directory: Path, program: Program, architecture: str, *, memory: CpuMemory, work: Work
) -> Array:
    places, num_bytes = arrange(program)
    tensors = weights.open_checkpoint(directory)
    pieces = weights.match(directory, program, architecture, tensors=tensors)
    data = huge(num_bytes)
    work.progress(0, num_bytes)

    def fill(value: Value) -> None:
        out = data[places[value]]
        if value.is_quantized:
            for e, part in enumerate(np.split(out, num_experts(value))):
                _round_matrix(part, value, weights.strips_of(pieces[value], tensors, e), memory)
        else:
            array = out.view(np.float32).reshape(sized(value.shape, {}))
            weights.join(array, value, pieces[value], tensors)

    # The largest first, so that no thread is left alone with it.
    values = sorted(places, key=lambda value: -weight_bytes(value))
    done = 0
    with ThreadPoolExecutor(work.threads) as pool:
        for value, _ in zip(values, pool.map(fill, values), strict=True):
            done += weight_bytes(value)
            work.progress(done, num_bytes)
    work.progress(num_bytes, num_bytes)
    return data


def _round_matrix(out: Array, value: Value, strips: list[Strip], memory: CpuMemory) -> None:
    """Write one matrix, or an expert's, to where it lies, block by block."""
    N, K = sized(value.shape, {})[-2:]
    num_rows = max(1, BLOCK_BYTES // (4 * K * TILE)) * TILE
    block = np.empty((min(num_rows, N), K), np.float32)
    for first in range(0, N, num_rows):
        rows = block[: N - first]
        for strip in strips:
            strip.read(rows, first)
        rows += np.float32(value.plus)
        if not memory.round(out, rows, (N, K), value.group, first=first):
            files = ", ".join(sorted({strip.tensor.name for strip in strips}))
            raise ArtifactError(
                f"{strips[0].tensor.file}: {files}: a number is not finite, or too large to be quantized"
            )
    for strip in strips:  # a block that is read brings pages of the one before it back
        strip.tensor.let_go(strip.stored)


def _kept(value: Value, data: Array, memory: CpuMemory) -> Array | PackedMatrix:
    shape = sized(value.shape, {})
    if not value.is_quantized:
        return data.view(np.float32).reshape(shape)
    return memory.packed(data, shape, value.group)
