"""Checkpoints to weights: what is read, and that nothing unsound gets past the reader."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import make_checkpoint
from vivace.engine.errors import ArtifactError
from vivace.engine.models.decoder import emit
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.weights import load, read_file

Q = "model.layers.0.self_attn.q_proj.weight"


def load_all(directory, progress=lambda done, total: None):
    spec = read_spec(directory)
    return load(directory, emit(spec), spec.architecture, progress)


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path, "qwen3")


@pytest.fixture
def edit(checkpoint):
    """Change the tensors of the checkpoint and return it."""

    def edit(change):
        path = checkpoint / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return checkpoint

    return edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"], ids=["one file", "shards"])
def test_weights_are_the_checkpoint_in_fp32(tmp_path, dtype, shard_size):
    make_checkpoint(tmp_path, "llama", dtype=dtype, shard_size=shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (shard_size == "60KB")
    tensors = {name: t.float().numpy() for path in files for name, t in load_file(path).items()}
    got = load_all(tmp_path)
    assert all(array.dtype == np.float32 for array in got.values())
    assert np.array_equal(got["embed"], tensors["model.embed_tokens.weight"])
    assert np.array_equal(got["lm_head"], tensors["lm_head.weight"])
    at = "model.layers.1"
    qkv = [tensors[f"{at}.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert np.array_equal(got["layers.1.attention.qkv"], np.concatenate(qkv))
    gate_up = [tensors[f"{at}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
    assert np.array_equal(got["layers.1.mlp.gate_up"], np.concatenate(gate_up))
    assert sum(a.size for a in got.values()) == sum(t.size for t in tensors.values())


def test_every_16_bit_number_is_converted_exactly(tmp_path):
    """All bit patterns, infinities and subnormals included, through the door that models use."""
    make_checkpoint(tmp_path, "llama", vocab_size=1024, hidden_size=64)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).reshape(1024, 64)
    for dtype in (torch.bfloat16, torch.float16):
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["model.embed_tokens.weight"] = want = patterns.view(dtype)
        save_file(tensors, tmp_path / "model.safetensors")
        got = load_all(tmp_path)["embed"]
        assert np.array_equal(got, want.float().numpy(), equal_nan=True)


def test_progress_ends_at_the_size_of_the_checkpoint(checkpoint):
    calls = []
    load_all(checkpoint, lambda done, total: calls.append((done, total)))
    total = sum(tensor.num_bytes for tensor in read_file(checkpoint / "model.safetensors"))
    assert calls[0] == (0, total) and calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_reading_does_not_change_the_file(checkpoint):
    path = checkpoint / "model.safetensors"
    before = path.read_bytes()
    for array in load_all(checkpoint).values():
        array[...] = 7
    assert path.read_bytes() == before


def test_tensors_at_odd_offsets_are_read(checkpoint):
    """The format does not promise alignment."""
    path = checkpoint / "model.safetensors"
    want = {name: array.copy() for name, array in load_all(checkpoint).items()}
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size] + b" " * (1 + -(size + 1) % 2)
    header += b" " * (1 - (len(header) % 2))
    assert (8 + len(header)) % 4 != 0
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    got = load_all(checkpoint)
    assert all(np.array_equal(got[name], want[name]) for name in want)
    assert all(array.flags.aligned for array in got.values())  # the C++ library needs it


def test_a_missing_tensor_is_named(edit):
    with pytest.raises(ArtifactError, match=rf"lacks {Q}$"):
        load_all(edit(lambda tensors: tensors.pop(Q)))


def test_an_untied_head_that_is_missing_is_named(edit):
    with pytest.raises(ArtifactError, match=r"lacks lm_head\.weight$"):
        load_all(edit(lambda tensors: tensors.pop("lm_head.weight")))


def test_unexpected_tensors_are_named(edit):
    name = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(ArtifactError, match=rf"holds {name}, which its architecture does not use"):
        load_all(edit(lambda tensors: tensors.update({name: torch.zeros(64)})))


def test_layers_past_the_last_are_unexpected(edit):
    name = "model.layers.2.self_attn.q_proj.weight"
    with pytest.raises(ArtifactError, match=name):
        load_all(edit(lambda tensors: tensors.update({name: torch.zeros(64, 64)})))


def test_frequencies_that_old_checkpoints_carry_are_harmless(edit):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    assert load_all(edit(lambda tensors: tensors.update({name: torch.zeros(8)})))


@pytest.mark.parametrize("shape", [(64, 63), (63, 64), (64,), (64, 64, 1)])
def test_a_misshapen_tensor_is_named_with_both_shapes(edit, shape):
    with pytest.raises(ArtifactError) as caught:
        load_all(edit(lambda tensors: tensors.update({Q: torch.zeros(shape)})))
    assert f"{Q} must be [64, 64], got {list(shape)}" in str(caught.value)


def test_parts_of_the_wrong_size_are_refused_though_their_sum_is_right(edit):
    def change(tensors):
        at = "model.layers.0.self_attn"
        tensors[f"{at}.k_proj.weight"] = torch.zeros(48, 64)
        tensors[f"{at}.v_proj.weight"] = torch.zeros(16, 64)

    with pytest.raises(ArtifactError, match=r"k_proj\.weight must be \[32, 64\], got \[48, 64\]"):
        load_all(edit(change))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn], ids=str)
def test_other_number_formats_are_refused_by_tensor(edit, dtype):
    with pytest.raises(ArtifactError, match=f"tensor {Q} holds"):
        load_all(edit(lambda tensors: tensors.update({Q: torch.zeros(64, 64, dtype=dtype)})))


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
    make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    assert "lm_head" not in load_all(tmp_path)
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load_all(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_by_name(checkpoint, name):
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    with pytest.raises(ArtifactError, match=f"{name} is a pickled file"):
        load_all(checkpoint)


def test_a_directory_without_weights_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"neither model\.safetensors nor"):
        load_all(checkpoint)


def written(header, data=b"", *, size=None):
    """A safetensors file as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(start, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


UNSOUND = {
    "empty": (b"", "cannot be mapped"),
    "no header": (b"1234", "truncated"),
    "header past the end": (written({}, size=100), "header of 100 bytes"),
    "header of 2**63 bytes": (written({}, size=2**63), "header of"),
    "not json": (written(b"{,}"), "not JSON"),
    "not utf-8": (written(b'{"\xff": 1}'), "not JSON"),
    "not an object": (written([1]), "not a JSON object"),
    "nested without end": (written(b"[" * 100_000), "not JSON"),
    "a key twice": (written(b'{"a": 1, "a": 2}'), "twice"),
    "entry not an object": (written({"a": 3}), "tensor a: its entry"),
    "no dtype": (written({"a": {"shape": [1], "data_offsets": [0, 4]}}), "tensor a: unknown dtype"),
    "unknown dtype": (written({"a": entry(0, 16, dtype="F31")}, bytes(16)), "dtype 'F31'"),
    "negative shape": (written({"a": entry(0, 16, (-4,))}, bytes(16)), "tensor a: bad shape"),
    "fractional shape": (written({"a": entry(0, 16, (4.0,))}, bytes(16)), "bad shape"),
    "offsets backwards": (written({"a": entry(16, 0)}, bytes(16)), "bad data_offsets"),
    "one offset": (written({"a": entry(0, 16) | {"data_offsets": [0]}}), "bad data_offsets"),
    "past the end": (written({"a": entry(0, 16)}, bytes(15)), "tensor a: ends at byte"),
    "too few bytes": (written({"a": entry(0, 12)}, bytes(12)), "12 bytes do not hold F32"),
    "wild shape": (written({"a": entry(0, 16, (2**62, 2**62))}, bytes(16)), "do not hold"),
    "overlap": (written({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)), "tensor b overlaps"),
    "gap": (written({"a": entry(0, 16), "b": entry(20, 36)}, bytes(36)), "b leaves a gap"),
    "bytes at the end": (written({"a": entry(0, 16)}, bytes(20)), "4 bytes after the last"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_an_unsound_file_is_refused_and_named(tmp_path, case):
    data, named = UNSOUND[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=named) as caught:
        read_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"model\.safetensors"):
            load_all(checkpoint)


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of several files, and a way to change its index."""
    make_checkpoint(tmp_path, "llama", shard_size="60KB")
    path = tmp_path / "model.safetensors.index.json"

    def edit(change):
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))
        return tmp_path

    return edit


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a.bin", 3, None]
)
def test_an_index_cannot_name_files_elsewhere(sharded, shard):
    with pytest.raises(ArtifactError, match="is not the name of a safetensors file beside it"):
        load_all(sharded(lambda weight_map: weight_map.update({Q: shard})))


def test_a_shape_of_many_dimensions_is_refused_at_once(tmp_path):
    entry = {"dtype": "F32", "shape": [2**62] * 100_000, "data_offsets": [0, 4]}
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ArtifactError, match="tensor a: bad shape") as caught:
        read_file(tmp_path / "a.safetensors")
    assert len(str(caught.value)) < 1100


def test_a_pipe_for_weights_is_not_waited_for(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    os.mkfifo(checkpoint / "model.safetensors")
    with pytest.raises(ArtifactError, match="is not a file"):
        load_all(checkpoint)


def test_a_shard_that_is_missing_is_named(sharded):
    directory = sharded(lambda weight_map: None)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ArtifactError, match=shard.name):
        load_all(directory)


def test_an_index_that_lists_too_much_or_too_little_is_refused(sharded):
    with pytest.raises(ArtifactError, match=f"does not list {Q}"):
        load_all(sharded(lambda weight_map: weight_map.pop(Q)))
    first = "model-00001-of-"

    def add(weight_map):
        shard = next(name for name in weight_map.values() if name.startswith(first))
        weight_map.update({Q: weight_map.get(Q, shard), "nothing": shard})

    with pytest.raises(ArtifactError, match="index"):
        load_all(sharded(add))
