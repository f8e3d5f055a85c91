"""Rotary frequencies, the numbers of Hugging Face transformers, and the call that turns them into a
step's table."""

import math
from typing import Any

import numpy as np

from vivace.engine.models.builder import Builder
from vivace.engine.models.program import Value
from vivace.engine.models.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeSpec,
    YarnScaling,
)

Array = np.ndarray[Any, np.dtype[np.float32]]


def emit_rope_table(
    b: Builder, at: str, positions_T: Value, *, variants_T: Value | None, spec: RopeSpec
) -> Value:
    """Cosines and sines of the step's positions, [T, rotary_dim]. `variants` says whose context is
    long, where a layer's rotation depends on it."""
    inv_freq = b.constant(f"{at}.inv_freq", inverse_frequencies(spec))
    cos_sin_TR = b.activation("rope_table", *positions_T.shape, spec.rotary_dim)
    ins: tuple[Value, ...] = (positions_T, inv_freq)
    if isinstance(spec.scaling, LongRopeScaling):
        assert variants_T is not None
        ins = (*ins, variants_T)
    b.call("rope_table", (cos_sin_TR,), ins, (("scale", attention_factor(spec)),))
    return cos_sin_TR


def attention_factor(spec: RopeSpec) -> float:
    """What cosines and sines are multiplied by."""
    if isinstance(spec.scaling, YarnScaling | LongRopeScaling):
        return spec.scaling.attention_factor
    return 1.0


def inverse_frequencies(spec: RopeSpec) -> Array:
    """theta^(-2i/D) in fp32, scaled as the spec says: [1, D/2], or [2, D/2] with those of long
    contexts below."""
    dim = np.float32(spec.rotary_dim)
    exponents = np.arange(0, spec.rotary_dim, 2, dtype=np.float32) / dim
    # The power in fp64, rounded once: nearer to what torch's fp32 power gives than NumPy's own fp32
    # power.
    powers = np.power(np.float64(spec.theta), exponents.astype(np.float64)).astype(np.float32)
    one = np.float32(1)
    match spec.scaling:
        case None:
            return (one / powers)[None]
        case LinearScaling(factor):
            return (one / powers / np.float32(factor))[None]
        case Llama3Scaling():
            return _llama3(one / powers, spec.scaling)[None]
        case YarnScaling():
            return _yarn(powers, spec, spec.scaling)[None]
        case LongRopeScaling(short, long):
            factors = np.array([short, long], np.float32)
            return (one / (factors * powers)).astype(np.float32)


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


def _yarn(powers: Array, spec: RopeSpec, scaling: YarnScaling) -> Array:
    """Mixed by a ramp over the dimensions between `beta_fast` and `beta_slow` rotations.
    arXiv:2309.00071, section 3.2."""
    low, high = (
        _dimension_of(rotations, spec, scaling.original_max_position)
        for rotations in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = (np.arange(spec.rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    kept = 1 - np.clip(ramp, 0, 1)
    stretched = np.float32(1) / (np.float32(scaling.factor) * powers)
    mixed: Array = stretched * (1 - kept) + (np.float32(1) / powers) * kept
    return mixed


def _dimension_of(rotations: float, spec: RopeSpec, original: int) -> float:
    """The dimension that turns so many times over the original context; arXiv:2309.00071, eq. 17
    solved for d."""
    turns = math.log(original / (rotations * 2 * math.pi))
    return spec.rotary_dim * turns / (2 * math.log(spec.theta))
