"""Rotary frequencies, the numbers of Hugging Face transformers, and the call that turns them into a
step's table."""

import math
from typing import Any

import numpy as np

from vivace.engine.models.builder import Builder
from vivace.engine.models.program import Value
from vivace.engine.models.spec import Llama3Scaling, RopeSpec

Array = np.ndarray[Any, np.dtype[np.float32]]


def emit_rope_table(b: Builder, at: str, positions_T: Value, spec: RopeSpec) -> Value:
    """Cosines and sines of the step's positions, [T, rotary_dim]."""
    inv_freq = b.constant(f"{at}.inv_freq", tuple(inverse_frequencies(spec).tolist()))
    cos_sin_TR = b.activation("rope_table", *positions_T.shape, spec.rotary_dim)
    b.call("rope_table", (cos_sin_TR,), (positions_T, inv_freq), (("scale", 1.0),))
    return cos_sin_TR


def inverse_frequencies(spec: RopeSpec) -> Array:
    """theta^(-2i/D) in fp32, [D/2], stretched as the spec says."""
    exponents = np.arange(0, spec.rotary_dim, 2, dtype=np.float32) / np.float32(spec.rotary_dim)
    # The power in fp64, rounded once: nearer to what torch's fp32 power gives than NumPy's own fp32
    # power.
    powers = np.power(np.float64(spec.theta), exponents.astype(np.float64)).astype(np.float32)
    inv_freq = np.float32(1) / powers
    return inv_freq if spec.scaling is None else _llama3(inv_freq, spec.scaling)


def _llama3(inv_freq: Array, scaling: Llama3Scaling) -> Array:
    """Long waves are stretched by `factor`, short ones kept, those between mixed. arXiv:2407.21783,
    section 3.2."""
    original = scaling.original_max_position
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = np.float32(2 * math.pi) / inv_freq
    stretched = inv_freq / np.float32(scaling.factor)
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    mixed = (1 - smooth) * inv_freq / np.float32(scaling.factor) + smooth * inv_freq
    result = np.where(wavelengths > np.float32(original / low), stretched, mixed)
    return np.where(wavelengths < np.float32(original / high), inv_freq, result)
