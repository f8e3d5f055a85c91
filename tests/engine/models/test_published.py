"""Configs of published checkpoints are read, and mean what they mean to transformers."""

import json

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.architectures import PUBLISHED
from vivace.engine.models.architecture import supported
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.rope import attention_factor, inverse_frequencies
from vivace.engine.models.spec import MoeSpec


@pytest.fixture(params=PUBLISHED)
def model(request, tmp_path):
    """Our reading and transformers'."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[request.param]))
    return read_spec(tmp_path), AutoConfig.from_pretrained(tmp_path)


def test_every_architecture_is_here():
    assert {name for one in PUBLISHED.values() for name in one["architectures"]} == {*supported()}


def test_heads_windows_and_embeddings_are_those_of_transformers(model):
    ours, theirs = model
    attention = ours.layers[0].attention
    assert attention.num_kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None)
    assert attention.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.norm.eps == theirs.rms_norm_eps
    kinds = getattr(theirs, "layer_types", None)
    if kinds is None:
        kind = "sliding" if getattr(theirs, "sliding_window", None) else "full"
        kinds = [f"{kind}_attention"] * theirs.num_hidden_layers
    want = [theirs.sliding_window if kind.startswith("sliding") else None for kind in kinds]
    assert [layer.attention.window for layer in ours.layers] == want


def test_rotations_are_those_of_transformers(model):
    ours, theirs = model
    by_kind = "full_attention" in theirs.rope_parameters
    skipped = getattr(theirs, "no_rope_layers", None)
    for i, layer in enumerate(ours.layers):
        rope = layer.attention.rope
        if skipped is not None and not skipped[i]:
            assert rope.rotary_dim == 0
            continue
        parameters, kind = theirs.rope_parameters, None
        if by_kind:
            kind = "sliding_attention" if layer.attention.window else "full_attention"
            parameters = parameters[kind]
        part = parameters.get("partial_rotary_factor") or 1.0
        assert (rope.theta, rope.rotary_dim) == (
            parameters["rope_theta"],
            int(layer.attention.head_dim * part),
        )
        if parameters["rope_type"] != "default":
            made = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu", layer_type=kind)
            np.testing.assert_allclose(inverse_frequencies(rope)[0], made[0].numpy(), rtol=1e-6)
            assert attention_factor(rope) == pytest.approx(made[1])
        else:
            assert rope.scaling is None


def test_experts_are_those_of_transformers(model):
    ours, theirs = model
    moe = ours.layers[-1].mlp
    num_experts = getattr(theirs, "num_experts", getattr(theirs, "num_local_experts", None))
    assert isinstance(moe, MoeSpec) == (num_experts is not None)
    if num_experts is not None:
        assert (moe.num_experts, moe.top_k) == (num_experts, theirs.num_experts_per_tok)
        size = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert moe.hidden_size == size
