"""Rotary frequencies against transformers' own."""

import numpy as np
import pytest
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vivace.engine.models.architecture import read_architecture
from vivace.engine.models.hf_rope import read_ropes
from vivace.engine.models.json_fields import Fields
from vivace.engine.models.rope import attention_factor, inverse_frequencies
from vivace.engine.models.spec import RopeSpec

CONTEXT = 131072
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, other bounds": YARN | {"beta_fast": 16, "beta_slow": 2},
    "yarn, bounds that meet": YARN | {"beta_fast": 2, "beta_slow": 2},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn, attention factor": YARN | {"attention_factor": 1.5},
}


def ours(parameters, head_dim, theta, *, name="LlamaForCausalLM", **config):
    """The rotation that is read from a config with these parameters."""
    values = {
        "max_position_embeddings": CONTEXT,
        "rope_theta": 2.0,  # what the parameters say comes first
        "rope_parameters": {"rope_theta": theta, **parameters},
        **config,
    }
    [rope] = read_ropes(
        Fields("config.json", values),
        read_architecture(name),
        head_dim,
        rotates=[True],
        has_window=[False],
    )
    return rope


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 128, 256])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_frequencies_are_those_of_transformers_to_one_unit_in_the_last_place(head_dim, theta):
    parameters = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(head_dim=head_dim, rope_parameters=parameters)
    [got] = inverse_frequencies(RopeSpec(theta, head_dim))
    assert got.dtype == np.float32
    np.testing.assert_array_max_ulp(got, LlamaRotaryEmbedding(config).inv_freq.numpy(), maxulp=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("theta", [1e4, 150000.0])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_are_those_of_transformers(name, head_dim, theta):
    parameters = SCALED[name]
    config = LlamaConfig(
        head_dim=head_dim,
        rope_parameters={"rope_theta": theta, **parameters},
        max_position_embeddings=CONTEXT,
    )
    want, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    rope = ours(parameters, head_dim, theta)
    [got] = inverse_frequencies(rope)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("extra", [{}, {"factor": 5.0}, {"attention_factor": 1.25}])
@pytest.mark.parametrize("rope_type", ["longrope", "su"])
def test_longrope_has_a_table_for_each_kind_of_context(extra, rope_type):
    parameters = {
        "short_factor": [1.0 + i / 32 for i in range(32)],
        "long_factor": [2.0 + i for i in range(32)],
        **extra,
    }
    config = Phi3Config(
        hidden_size=128,
        num_attention_heads=2,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **parameters},
        max_position_embeddings=CONTEXT,
        original_max_position_embeddings=4096,
    )
    rope = ours(
        {"rope_type": rope_type, **parameters},
        64,
        1e4,
        name="Phi3ForCausalLM",
        original_max_position_embeddings=4096,
    )
    tables = inverse_frequencies(rope)
    for got, length in zip(tables, (4096, 4097), strict=True):
        want, factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6, atol=0)
        assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)
    assert not np.array_equal(*tables)
