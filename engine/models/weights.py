"""The only reader of checkpoints: safetensors files, mapped into memory, to the weights of a
program.

Nothing of a file is believed: lengths, offsets and shapes are checked before a number is read, and
every tensor must be there, be expected and have the shape that the program says. Pickled files are
refused: reading one can run code.
"""

import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from vivace.engine.errors import ArtifactError
from vivace.engine.models.architecture import Architecture, read_architecture
from vivace.engine.models.json_fields import read_fields, refuse_pipe
from vivace.engine.models.program import Kind, Program, Value, sized, values_of
from vivace.kernels.buffer import DType

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]  # bytes read, bytes in all

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
MAX_DIMENSIONS = 8
SLAB_BYTES = 16 << 20  # of a file, that are read before their pages are given back
FORMATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # that can be read
MATRICES = {"linear": 1, "expert_linear": 2, "embed": 1}  # op -> which of `ins` may be bf16
# Tensors of old checkpoints that follow from the config.
HARMLESS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file that is mapped; `start` and `end` are bytes of the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    data: mmap.mmap
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start

    def raw(self) -> Array:
        """The bytes, shared with the mapping."""
        return np.frombuffer(self.data, np.uint8, self.num_bytes, self.start)

    def slabs(self) -> Iterator[tuple[slice, Array]]:
        """The rows piece by piece, as bytes [rows, bytes of a row].

        The pages of a piece are let go when the next is asked for: what was read from them has been
        copied, and the file still has them.
        """
        num_rows = self.shape[0] if self.shape else 1
        row_bytes = self.num_bytes // max(num_rows, 1)
        count = max(1, SLAB_BYTES // max(row_bytes, 1))
        rows_of_bytes = self.raw().reshape(num_rows, row_bytes)
        for first in range(0, num_rows, count):
            rows = slice(first, min(first + count, num_rows))
            yield rows, rows_of_bytes[rows]
            self._drop(self.start + rows.start * row_bytes, self.start + rows.stop * row_bytes)

    def let_go(self, part: Array) -> None:
        """Give back the pages of a view of the mapping. It stays valid: the file still has them."""
        origin = self.raw().__array_interface__["data"][0] - self.start
        low, high = np.lib.array_utils.byte_bounds(part)
        self._drop(low - origin, high - origin)

    def _drop(self, start: int, end: int) -> None:
        start = start // mmap.PAGESIZE * mmap.PAGESIZE
        self.data.madvise(mmap.MADV_DONTNEED, start, end - start)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a weight, and the tensor that it is read from."""

    tensor: str
    place: tuple[int | slice, ...]  # within the weight
    shape: tuple[int, ...]  # within the file
    transposed: bool  # stored [..., inputs, outputs]
    interleaved: bool  # stored gate, up, gate, up ...


@dataclass(frozen=True, slots=True)
class Strip:
    """Consecutive rows [n, K] of a matrix as the file has them."""

    tensor: Tensor
    first: int  # which row of the matrix the first one is
    stored: Array  # a view of the mapping

    def read(self, out_NK: Array, first: int) -> None:
        """Write what is of rows `first` to `first + N`, in fp32; their pages are let go."""
        start, stop = (
            max(first, self.first),
            min(first + len(out_NK), self.first + len(self.stored)),
        )
        if start < stop:
            rows = self.stored[start - self.first : stop - self.first]
            _convert(out_NK[start - first : stop - first], rows)
            self.tensor.let_go(rows)


def load(
    directory: Path,
    program: Program,
    architecture: str,
    progress: Progress,
    *,
    place: Callable[[Value, Array], Any] = lambda value, array: array,
) -> dict[str, Any]:
    """The weights of the program by our names; the architecture's file knows the checkpoint's. `place` makes of each, in
    fp32 or the bits of bf16 as the program says, what is kept of it.

    An fp32 tensor that is a weight by itself stays a view of the mapped file. Raises ArtifactError
    naming the file or the tensor, and then nothing was converted yet.
    """
    tensors = open_checkpoint(directory)
    pieces = match(directory, program, architecture, tensors=tensors)
    total = sum(tensors[p.tensor].num_bytes for parts in pieces.values() for p in parts)
    weights: dict[str, Any] = {}
    done = 0
    progress(done, total)
    for value, parts in pieces.items():
        weights[value.name] = place(value, joined(value, parts, tensors))
        done += sum(tensors[piece.tensor].num_bytes for piece in parts)
        progress(done, total)
    return weights


def as_stored(directory: Path, program: Program, architecture: str) -> Program:
    """The program with bf16 for those matrices that the checkpoint has in bf16 and that ops read so: half the memory for the
    same numbers. As it was for a checkpoint that cannot be read, which `load` then refuses."""
    try:
        tensors = open_checkpoint(directory)
    except ArtifactError:
        return program
    names = read_architecture(architecture)
    return in_bf16(
        program,
        lambda value: all(
            piece.tensor in tensors and tensors[piece.tensor].dtype == "BF16"
            for piece in pieces_of(value, names)
        ),
    )


def in_bf16(program: Program, is_bf16: Callable[[Value], bool]) -> Program:
    """The program with bf16 for those matrices that are so in the checkpoint and that ops read so."""
    as_matrix = {call.ins[MATRICES[call.op]] for call in program.calls if call.op in MATRICES}
    otherwise = {
        value
        for call in program.calls
        for i, value in enumerate(call.ins)
        if MATRICES.get(call.op) != i
    }
    small = {
        value: replace(value, dtype=DType.BF16)
        for value in as_matrix - otherwise
        if value.kind is Kind.WEIGHT and not value.plus and is_bf16(value)
    }
    calls = tuple(
        replace(call, ins=tuple(small.get(value, value) for value in call.ins))
        for call in program.calls
    )
    return replace(program, calls=calls)


def check(directory: Path, program: Program, architecture: str) -> None:
    """Raise the ArtifactError that `load` would, without reading numbers (but those of a head that
    is tied and stored)."""
    match(directory, program, architecture, tensors=open_checkpoint(directory))


def open_checkpoint(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name: of `model.safetensors`, else of the shards that the
    index lists."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return {tensor.name: tensor for tensor in read_file(single)}
    if not index.exists():
        raise _no_weights(directory)
    weight_map = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(weight_map.values()):
        for tensor in read_file(directory / shard):
            if weight_map.get(tensor.name) != shard:
                raise ArtifactError(f"{index}: does not list {tensor.name} of {shard}")
            tensors[tensor.name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ArtifactError(f"{index}: lists {name}, which {shard} does not hold")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor to shard. A shard is a plain name, so that an index cannot reach files elsewhere. (A
    link is the owner's doing: caches use them.)"""
    weight_map = read_fields(index).raw("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{index}: weight_map must be an object that names tensors")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise ArtifactError(
                f"{index}: {shard!r} is not the name of a safetensors file beside it"
            )
    return weight_map


def read_file(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file, in the order of their bytes. Raises ArtifactError if it
    is not sound."""
    data = _mapped(path)
    if len(data) < 8:
        raise ArtifactError(f"{path}: is truncated ({len(data)} bytes hold no header)")
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ArtifactError(
            f"{path}: is truncated or no safetensors file "
            f"(a header of {header_bytes} bytes in {len(data)})"
        )
    first = 8 + header_bytes
    try:
        header = json.loads(data[8:first], object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: its header is not a JSON object")
    tensors = [
        _tensor(path, data, first, name=name, entry=entry)
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = first
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the one before it" if tensor.start < end else "leaves a gap before it"
            raise ArtifactError(f"{path}: tensor {tensor.name} {what}")
        end = tensor.end
    if end != len(data):
        raise ArtifactError(f"{path}: {len(data) - end} bytes after the last tensor belong to none")
    return tensors


def _mapped(path: Path) -> mmap.mmap:
    try:
        refuse_pipe(path)
        with path.open("rb") as file:
            # A private mapping: arrays on it can be written to, as some libraries demand, and the
            # file never changes.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be mapped ({error.strerror})") from error
    except ValueError as error:  # an empty file, a name that is none
        raise ArtifactError(f"{path}: cannot be mapped ({error})") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands there twice")
    return result


def _tensor(path: Path, data: mmap.mmap, first: int, *, name: str, entry: Any) -> Tensor:
    """One entry of a header, checked against the file."""
    at = f"{path}: tensor {name}"
    if not isinstance(entry, dict):
        raise ArtifactError(f"{at}: its entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ArtifactError(f"{at}: unknown dtype {dtype!r}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ArtifactError(f"{at}: bad shape {shape!r}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ArtifactError(f"{at}: bad data_offsets {offsets!r}")
    start, end = first + offsets[0], first + offsets[1]
    if end > len(data):
        raise ArtifactError(f"{at}: ends at byte {end}, the file at {len(data)}: it is truncated")
    if prod(shape) * BITS[dtype] != (end - start) * 8:
        raise ArtifactError(f"{at}: {end - start} bytes do not hold {dtype} {shape}")
    return Tensor(name, str(path), dtype, tuple(shape), data, start, end)


def _are_counts(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _no_weights(directory: Path) -> ArtifactError:
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    if pickled:
        return ArtifactError(
            f"{directory}: {pickled[0]} is a pickled file, which can run code when it is read; "
            "only safetensors are read, so convert it first"
        )
    return ArtifactError(f"{directory}: neither model.safetensors nor model.safetensors.index.json")


def match(
    directory: Path, program: Program, architecture: str, *, tensors: Mapping[str, Tensor]
) -> dict[Value, list[Piece]]:
    """What each weight is read from; raises ArtifactError for missing, misshapen and unexpected
    tensors."""
    names = read_architecture(architecture)
    pieces = {
        value: pieces_of(value, names) for value in values_of(program) if value.kind is Kind.WEIGHT
    }
    wanted = [piece for parts in pieces.values() for piece in parts]
    if missing := [piece.tensor for piece in wanted if piece.tensor not in tensors]:
        raise ArtifactError(f"{directory}: the checkpoint lacks {_listed(missing)}")
    for piece in wanted:
        _check_tensor(tensors[piece.tensor], piece.shape)
    used = {piece.tensor for piece in wanted}
    _refuse_unexpected(directory, names, tensors=tensors, used=used)
    return pieces


def pieces_of(value: Value, names: Architecture) -> list[Piece]:
    """Where a weight comes from: one tensor, or one for each of its parts, below each other, and
    that for each expert."""
    name, layer = generic_name(value.name)
    shape = sized(value.shape, {})
    patterns = [pattern.replace("{i}", layer) for pattern in names.weights[name]]
    if "{e}" in patterns[0]:
        return [
            replace(piece, tensor=piece.tensor.replace("{e}", str(e)), place=(e, *piece.place))
            for e in range(shape[0])
            for piece in _stacked(patterns, shape[1:], value.parts)
        ]
    transposed, interleaved = name in names.transposed, name in names.interleaved
    if len(patterns) == 1 and (transposed or interleaved or len(shape) == 3):
        stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        return [Piece(patterns[0], (), stored, transposed, interleaved)]
    return _stacked(patterns, shape, value.parts)


def generic_name(name: str) -> tuple[str, str]:
    """A weight's name for any layer, and its layer."""
    layer = re.match(r"layers\.(\d+)\.", name)
    return (name, "") if layer is None else (f"layers.{{i}}.{name[layer.end() :]}", layer[1])


def _stacked(patterns: list[str], shape: tuple[int, ...], parts: tuple[int, ...]) -> list[Piece]:
    """Tensors below each other; a single one may hold all parts."""
    heights = parts if len(patterns) > 1 else shape[:1]
    pieces = []
    row = 0
    for pattern, height in zip(patterns, heights, strict=True):
        place = (slice(row, row + height),)
        pieces.append(Piece(pattern, place, (height, *shape[1:]), False, False))
        row += height
    return pieces


def _check_tensor(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ArtifactError(
            f"{tensor.file}: tensor {tensor.name} must be {list(shape)}, got {list(tensor.shape)}"
        )
    if tensor.dtype not in FORMATS:
        raise ArtifactError(
            f"{tensor.file}: tensor {tensor.name} holds {tensor.dtype}; "
            f"what can be read is {', '.join(FORMATS)}"
        )


def _refuse_unexpected(
    directory: Path, names: Architecture, *, tensors: Mapping[str, Tensor], used: set[str]
) -> None:
    [embed], [head] = names.weights["embed"], names.weights["lm_head"]
    unexpected = [name for name in tensors if name not in used and not HARMLESS.fullmatch(name)]
    if head in unexpected and embed in used:  # tied, and stored all the same
        _refuse_different(tensors[head], tensors[embed])
        unexpected.remove(head)
    if unexpected:
        raise ArtifactError(
            f"{directory}: the checkpoint holds {_listed(unexpected)}, "
            "which its architecture does not use"
        )


def _refuse_different(tensor: Tensor, twin: Tensor) -> None:
    same_form = (tensor.dtype, tensor.shape) == (twin.dtype, twin.shape)
    slabs = zip(tensor.slabs(), twin.slabs(), strict=True)
    if not same_form or not all(np.array_equal(a, b) for (_, a), (_, b) in slabs):
        raise ArtifactError(
            f"{tensor.file}: tensor {tensor.name} differs from {twin.name}, "
            "though config.json says that they are tied"
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def strips_of(pieces: list[Piece], tensors: Mapping[str, Tensor], expert: int) -> list[Strip]:
    """What a matrix is read from, but for what `plus` adds; of experts', that of one."""
    strips = []
    for piece in pieces:
        tensor = tensors[piece.tensor]
        stored = tensor.raw().view(FORMATS[tensor.dtype]).reshape(tensor.shape)
        *of_expert, rows = piece.place or (slice(0, None),)
        assert isinstance(rows, slice)
        if of_expert and of_expert != [expert]:
            continue
        if stored.ndim == 3:
            stored = stored[expert]
        if piece.transposed:
            stored = stored.T
        parts = [stored[0::2], stored[1::2]] if piece.interleaved else [stored]
        first = rows.start
        for part in parts:
            strips.append(Strip(tensor, first, part))
            first += len(part)
    return strips


def joined(value: Value, pieces: list[Piece], tensors: Mapping[str, Tensor]) -> Array:
    """One weight in its type. It stays in the file where it is fp32 and nothing has to be done to it."""
    tensor = tensors[pieces[0].tensor]
    is_as_stored = tensor.dtype == "F32" and tensor.start % 4 == 0 and not value.plus
    if len(pieces) == 1 and is_as_stored and not pieces[0].transposed | pieces[0].interleaved:
        return tensor.raw().view(np.float32).reshape(value.shape)
    kind = np.uint16 if value.dtype is DType.BF16 else np.float32
    out = np.empty(sized(value.shape, {}), kind)
    join(out, value, pieces, tensors)
    return out


def join(out: Array, value: Value, pieces: list[Piece], tensors: Mapping[str, Tensor]) -> None:
    """Write one weight in fp32, or one that is stored so in bf16."""
    for piece in pieces:
        _read_into(out[piece.place], piece, tensors[piece.tensor])
    if value.plus:
        out += np.float32(value.plus)


def _read_into(out: Array, piece: Piece, tensor: Tensor) -> None:
    for rows, raw in tensor.slabs():
        stored = raw.view(FORMATS[tensor.dtype]).reshape(len(raw), *tensor.shape[1:])
        if piece.transposed:
            stored = np.swapaxes(stored, -1, -2)
        if not piece.interleaved:
            _convert(out[rows], stored)
            continue
        gate, up = np.split(out[rows], 2, axis=1)  # the first axis is the expert
        _convert(gate, stored[:, 0::2])
        _convert(up, stored[:, 1::2])


def _convert(out: Array, stored: Array) -> None:
    if stored.dtype == np.uint16 and out.dtype == np.float32:  # bf16: the upper half of an fp32
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = stored
