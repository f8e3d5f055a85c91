"""Rotary frequencies against transformers' own."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vivace.engine.models.rope import inverse_frequencies
from vivace.engine.models.spec import Llama3Scaling, RopeSpec


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 128, 256])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("scaling", [None, Llama3Scaling(8.0, 1.0, 4.0, 8192)])
def test_frequencies_are_those_of_transformers_to_one_unit_in_the_last_place(
    head_dim, theta, scaling
):
    parameters = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    config = LlamaConfig(
        head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=131072
    )
    want = LlamaRotaryEmbedding(config).inv_freq.numpy()
    got = inverse_frequencies(RopeSpec(theta, head_dim, scaling))
    assert got.dtype == np.float32
    np.testing.assert_array_max_ulp(got, want, maxulp=4 if scaling else 1)
