"""One token per row: penalties, bias, temperature, top-k, top-p, min-p, then the Gumbel-max draw.

In this order (that of transformers), in fp32: scores = logits. Each token of the row's penalty list, which names it once,
with its count in the reply (0: it is in the prompt alone): score / repetition if score > 0, else score * repetition; then
score - frequency * count; then score - presence if count > 0. scores += bias. Temperature 0 makes the row greedy and skips
the rest; scores /= temperature; top-k keeps the k best (0: all); top-p keeps the shortest run of the best whose probability,
among what top-k kept, reaches p (1: all); min-p drops those under p times the best one's probability (0: none). "Best" is
by score, ties to the lower id; at least one token stays. Dropped scores are -inf. What is -inf before stays so through all
of this; a row of which every score is -inf gives token 0, at any temperature.

The token is argmax(scores + g), ties to the lower id, g = -log(-log(u)): a draw from softmax(scores) (Gumbel-max,
arXiv:1411.0030). u = ((x >> 11) + 0.5) * 2^-53 with, in 64-bit unsigned arithmetic and mix = the finalizer of SplitMix64
(z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31):
x = mix(mix(seed + position * 0x9E3779B97F4A7C15) + token * 0xD1B54A32D192ED03). So a draw depends on the seed, the
position and the row's own logits, never on the rest of the batch. Probabilities and noise in fp64.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        tokens_R: Buffer,  # int32, out
        scores_RV: Buffer,  # fp32, out: softmax of a row is what it was drawn from
        logits_RV: Buffer,  # fp32
        temperature_R: Buffer,  # fp32, >= 0
        top_k_R: Buffer,  # int32, >= 0
        top_p_R: Buffer,  # fp32, in (0, 1]
        min_p_R: Buffer,  # fp32, in [0, 1]
        seeds_R: Buffer,  # int64, the bits of an unsigned seed
        positions_R: Buffer,  # int32, where the token will stand
        repetition_R: Buffer,  # fp32, > 0, 1: off
        frequency_R: Buffer,  # fp32
        presence_R: Buffer,  # fp32
        penalty_starts: Buffer,  # int32 [R + 1], as bias_starts
        penalty_ids: Buffer,  # int32 [P], of a row's none twice
        penalty_counts: Buffer,  # int32 [P], >= 0
        bias_starts: Buffer,  # int32 [R + 1], row r's entries are bias_starts[r] .. bias_starts[r+1] - 1
        bias_ids: Buffer,  # int32 [X], of a row's none twice with finite values
        bias_values: Buffer,  # fp32 [X], -inf forbids
    ) -> None: ...


def check(
    tokens_R: Buffer,
    scores_RV: Buffer,
    logits_RV: Buffer,
    temperature_R: Buffer,
    top_k_R: Buffer,
    top_p_R: Buffer,
    min_p_R: Buffer,
    seeds_R: Buffer,
    positions_R: Buffer,
    repetition_R: Buffer,
    frequency_R: Buffer,
    presence_R: Buffer,
    penalty_starts: Buffer,
    penalty_ids: Buffer,
    penalty_counts: Buffer,
    bias_starts: Buffer,
    bias_ids: Buffer,
    bias_values: Buffer,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    R, V = expect("logits", logits_RV, None, None)
    expect("scores", scores_RV, R, V)
    rows = (
        ("tokens", tokens_R, "int32"),
        ("temperature", temperature_R, "float32"),
        ("top_k", top_k_R, "int32"),
        ("top_p", top_p_R, "float32"),
        ("min_p", min_p_R, "float32"),
        ("seeds", seeds_R, "int64"),
        ("positions", positions_R, "int32"),
        ("repetition", repetition_R, "float32"),
        ("frequency", frequency_R, "float32"),
        ("presence", presence_R, "float32"),
    )
    for name, buffer, dtype in rows:
        expect(name, buffer, R)
        expect_dtype(name, buffer, dtype)
    expect_dtype("logits", logits_RV, "float32")
    expect_dtype("scores", scores_RV, "float32")
    lists = (
        ("penalty", penalty_starts, penalty_ids, ("counts", penalty_counts, "int32")),
        ("bias", bias_starts, bias_ids, ("values", bias_values, "float32")),
    )
    for name, starts, ids, (what, values, dtype) in lists:
        expect(f"{name}_starts", starts, R + 1)
        expect_dtype(f"{name}_starts", starts, "int32")
        (size,) = expect(f"{name}_ids", ids, None)
        expect_dtype(f"{name}_ids", ids, "int32")
        expect(f"{name}_{what}", values, size)
        expect_dtype(f"{name}_{what}", values, dtype)
