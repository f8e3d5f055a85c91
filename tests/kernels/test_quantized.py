"""Quantized rows and matrices: every instruction set gives the bits of the reference, and these are what the words say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.arrays import BACKENDS, ISAS, close, ops_of, out, run
from vivace.kernels.backend import Backend
from vivace.kernels.gated import ACTIVATIONS
from vivace.kernels.quantized import MAX_INPUTS, Quantized, quantize_int4, quantize_int8

each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda one: one.value)
each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda one: one.value)
KINDS = {"int8": None, "int4-32": 32, "int4-64": 64, "int4-128": 128}
each_kind = pytest.mark.parametrize("group", KINDS.values(), ids=KINDS)
SHAPES = [  # T, N, K
    (0, 5, 7), (1, 1, 1), (1, 33, 4), (2, 32, 3), (3, 31, 172), (4, 64, 128), (5, 70, 131), (7, 65, 33), (8, 32, 260),
    (12, 40, 129), (13, 33, 64), (16, 97, 96), (17, 32, 1), (29, 100, 97), (70, 34, 200),
    (301, 40, 70), (523, 33, 65),  # rows enough for each of 2, and of 4 threads
    (9, 33, 1157), (131, 32, 1024), (141, 35, 2065),  # past a block of inputs and a chunk of rows
    (16, 37, 896), (17, 32, 513), (33, 31, 1030), (47, 33, 515), (48, 40, 2048),  # 16 rows, part by part
    (49, 32, 516), (512, 35, 172),
]  # fmt: skip


def quantized(w, group):
    return quantize_int8(w) if group is None else quantize_int4(w, group)


def rows(ops, x):
    T, K = x.shape
    q, params = run(ops, "quantize", [out(ops, T, K, dtype=np.uint8), out(ops, T, 2)], x)
    return q, params


def project(ops, q, params, weight, bias=None):
    """With a weight packed by the backend."""
    upload = ops.memory.upload
    result = out(ops, len(q), weight.shape[0])
    op = ops.linear_int8 if weight.group is None else ops.linear_int4
    op(
        result,
        upload(q),
        upload(params),
        ops.memory.pack(weight),
        None if bias is None else upload(bias),
    )
    return ops.memory.read(result).copy()


def case(T, N, K, seed=0):
    rng = np.random.default_rng(seed)
    return (
        (3 * rng.standard_normal((T, K))).astype(np.float32),
        rng.standard_normal((N, K)).astype(np.float32),
        rng.standard_normal(N).astype(np.float32),
    )


@each_backend
def test_a_row_is_nearest_to_what_it_was(backend):
    x, _, _ = case(9, 1, 173)
    x[3], x[4], x[5] = 0, np.abs(x[4]), -np.abs(x[5])
    q, params = rows(ops_of(backend), x)
    scale, zero = params[:, :1], params[:, 1:]
    assert (zero == np.rint(zero)).all() and (zero >= 0).all() and (zero <= 255).all()
    assert np.abs(scale * (q - zero) - x).max() <= 0.51 * scale.max() + 1e-6
    assert (q[3] == zero[3]).all() and params[3, 0] == 1
    assert zero[4] == 0 and zero[5] == 255  # 0 itself is always exact


@each_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(backend, bad):
    x, w, _ = case(3, 33, 40)
    x[1, 7] = bad
    ops = ops_of(backend)
    y = project(ops, *rows(ops, x), quantize_int8(w))
    assert not np.isfinite(y[1]).any() and np.isfinite(y[[0, 2]]).all()


@each_backend
@each_kind
@pytest.mark.parametrize("size", (1e-35, 1e-37, 1e-38, 1e-40, 1e-45))
def test_a_row_that_is_next_to_nothing_gives_next_to_nothing(backend, group, size):
    """Down to subnormal numbers: the reciprocal of their scale would be infinite, and so would the result."""
    x, w, bias = case(3, 33, 40)
    x[0] *= np.float32(size)
    x[1] = np.abs(x[0])
    ops, weight = ops_of(backend), quantized(w, group)
    q, params = rows(ops, x)
    assert np.isfinite(params).all() and (params[:, 0] > 0).all()
    assert np.abs(project(ops, q, params, weight)[:2]).max() <= 1e3 * size
    assert np.array_equal(project(ops, q, params, weight, bias)[:2], [bias, bias])


MAKERS = [  # op, shapes of the inputs for rows of K, attributes
    ("rmsnorm", lambda T, K: [(T, K), (K,)], {"eps": 1e-6}),
    ("add_rmsnorm", lambda T, K: [(T, K), (T, K), (K,)], {"eps": 1e-6}),
    *(("gated", lambda T, K: [(T, 2 * K)], {"activation": name}) for name in ACTIVATIONS),
    ("gated", lambda T, K: [(T, 2, 2 * K)], {}),
]


@each_backend
@pytest.mark.parametrize(("op", "shapes", "attrs"), MAKERS)
@pytest.mark.parametrize("T", (0, 1, 3, 8, 70))
def test_rows_made_as_bytes_are_those_that_would_be_rounded_next(backend, op, shapes, attrs, T):
    """To the bit, on several threads too; what else the op makes is written as before."""
    for K in (1, 45, 173):
        rng = np.random.default_rng(T + K)
        ins = [(3 * rng.standard_normal(shape)).astype(np.float32) for shape in shapes(T, K)]
        ops = ops_of(backend)
        rows_of = ins[0].shape[:-1]
        also = [out(ops, T, K)] if op == "add_rmsnorm" else []
        *totals, plain = run(ops, op, [*also, out(ops, *rows_of, K)], *ins, **attrs)
        small = [out(ops, *rows_of, K, dtype=np.uint8), out(ops, *rows_of, 2)]
        want = [*totals, *run(ops, "quantize", small, plain)]
        for threads in (1, 2, 4):
            ops = ops_of(backend, threads) if backend is not Backend.REFERENCE else ops
            also = [out(ops, T, K)] if op == "add_rmsnorm" else []
            outs = [*also, out(ops, *rows_of, K, dtype=np.uint8), out(ops, *rows_of, 2)]
            for got, one in zip(run(ops, f"{op}_quantize", outs, *ins, **attrs), want, strict=True):
                assert np.array_equal(got, one)


@each_isa
@each_kind
@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
def test_every_instruction_set_has_the_bits_of_the_reference(isa, group, T, N, K):
    x, w, bias = case(T, N, K)
    reference = ops_of(Backend.REFERENCE)
    q, params = rows(reference, x)
    weight = quantized(w, group)
    for threads in (1, 2, 4):
        ops = ops_of(isa, threads)
        ours = rows(ops, x)
        assert np.array_equal(ours[0], q) and np.array_equal(ours[1], params)
        for b in (None, bias):
            want = project(reference, q, params, weight, b)
            got = project(ops, q, params, weight, b)
            assert got.shape == (T, N) and np.array_equal(got, want)


@each_isa
@settings(max_examples=40)
@given(
    T=st.integers(1, 20),
    N=st.integers(1, 70),
    K=st.integers(1, 300),
    group=st.sampled_from(list(KINDS.values())),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_shape_is_different(isa, T, N, K, group, seed):
    x, w, bias = case(T, N, K, seed)
    reference, ops = ops_of(Backend.REFERENCE), ops_of(isa)
    q, params = rows(reference, x)
    weight = quantized(w, group)
    assert np.array_equal(
        project(ops, q, params, weight, bias), project(reference, q, params, weight, bias)
    )


@each_backend
def test_sums_are_exact_at_the_extremes(backend):
    """255 * -127 * K, which fp32 could not add up."""
    K = MAX_INPUTS
    weight = Quantized(np.full((3, K), -127, np.int8), np.ones(3, np.float32))
    q = np.full((2, K), 255, np.uint8)
    params = np.array([[1, 0], [1, 255]], np.float32)
    y = project(ops_of(backend), q, params, weight)
    assert (y[0] == np.float32(-127 * 255 * K)).all() and (y[1] == 0).all()


@each_backend
@each_kind
def test_a_projection_is_what_the_numbers_stand_for(backend, group):
    x, w, bias = case(6, 50, 300)
    ops = ops_of(backend)
    q, params = rows(ops, x)
    weight = quantized(w, group)
    stands_for = params[:, :1].astype(np.float64) * (q - params[:, 1:].astype(np.float64))
    want = stands_for @ weight.dequantized().astype(np.float64).T + bias
    close(project(ops, q, params, weight, bias), want)


@each_isa
@each_kind
def test_a_row_alone_has_the_bits_that_it_has_in_a_batch(isa, group):
    x, w, _ = case(31, 66, 140)
    ops = ops_of(isa)
    q, params = rows(ops, x)
    weight = quantized(w, group)
    whole = project(ops, q, params, weight)
    for t in (0, 11, 12, 24, 30):
        assert np.array_equal(
            project(ops, q[t : t + 1], params[t : t + 1], weight), whole[t : t + 1]
        )


def routed(seed, T, K, E):
    """Slots of random experts, but all of one token's to the same, and the last expert to nobody."""
    experts = np.random.default_rng(seed).integers(0, max(1, E - 1), (T, K), np.int32)
    experts[T // 2 :][:1] = 0
    return experts


EXPERT_SHAPES = [  # T, K, E, N, M
    (0, 2, 3, 5, 7), (1, 1, 1, 1, 1), (1, 8, 64, 33, 172), (3, 3, 3, 64, 96), (16, 2, 5, 31, 131), (40, 8, 4, 40, 65),
    (260, 2, 2, 33, 9), (30, 3, 2, 32, 2065),  # past what is gathered at a time, and a block of inputs
]  # fmt: skip


@each_isa
@each_kind
@pytest.mark.parametrize("has_own_rows", (False, True))
@pytest.mark.parametrize(("T", "K", "E", "N", "M"), EXPERT_SHAPES)
def test_an_expert_is_a_projection_of_the_rows_that_chose_it(
    isa, group, has_own_rows, T, K, E, N, M
):
    """To the bit what `linear_int8` makes of each row with that expert's matrix alone; the reference as well."""
    rng = np.random.default_rng(T + N)
    x = (3 * rng.standard_normal((T, K, M) if has_own_rows else (T, M))).astype(np.float32)
    weight = quantized(rng.standard_normal((E, N, M)).astype(np.float32), group)
    bias = rng.standard_normal((E, N)).astype(np.float32)
    experts = routed(T, T, K, E)
    reference = ops_of(Backend.REFERENCE)
    q, params = run(
        reference,
        "quantize",
        [out(reference, *x.shape, dtype=np.uint8), out(reference, *x.shape[:-1], 2)],
        x,
    )
    op = f"expert_linear_{weight.dtype}"
    for b in (None, bias):
        want = np.empty((T, K, N), np.float32)
        for t, k in np.ndindex(T, K):
            at, e = (t, k) if has_own_rows else (t,), experts[t, k]
            alone = Quantized(weight.q[e], weight.scales[e], group)
            of_row = q[at][None], params[at][None], alone, None if b is None else b[e]
            want[t, k] = project(ops_of(isa), *of_row)[0]
        for ops in (reference, ops_of(isa), ops_of(isa, 2), ops_of(isa, 4)):
            packed = ops.memory.pack(weight)
            arrays = [ops.memory.upload(one) for one in (q, params, experts)]
            result = out(ops, T, K, N)
            more = [] if b is None else [ops.memory.upload(b)]
            getattr(ops, op)(result, *arrays, packed, *more)
            assert np.array_equal(ops.memory.read(result), want)


@each_isa
@each_kind
def test_an_expert_that_nobody_chose_is_not_read(isa, group):
    ops = ops_of(isa)
    weight = quantized(np.ones((3, 40, 64), np.float32), group)
    packed = ops.memory.pack(weight)
    packed.data.reshape(3, -1)[1] = 0xFF  # NaN, as scales
    q, params = np.full((2, 64), 9, np.uint8), np.ones((2, 2), np.float32)
    result = out(ops, 2, 2, 40)
    op = getattr(ops, f"expert_linear_{weight.dtype}")
    op(result, q, params, np.array([[0, 2], [2, 2]], np.int32), packed)
    assert np.isfinite(result).all()


@each_backend
def test_an_int8_embedding_is_its_rows(backend):
    rng = np.random.default_rng(0)
    table = quantize_int8(rng.standard_normal((70, 37)).astype(np.float32))
    tokens = np.array([0, 69, 31, 32, 5, 5], np.int32)
    ops = ops_of(backend)
    result = out(ops, 6, 37)
    ops.embed_int8(result, ops.memory.upload(tokens), ops.memory.pack(table), scale=1.5)
    want = table.q[tokens].astype(np.float32) * (table.scales[tokens] * np.float32(1.5))[:, None]
    assert np.array_equal(ops.memory.read(result), want)


def test_int8_is_rounding_to_the_nearest_of_255_steps():
    w = np.array([[1.0, -2.0, 0.5], [0, 0, 0], [3e-3, 1e-3, -1e-3]], np.float32)
    found = quantize_int8(w)
    assert found.q.tolist() == [[64, -127, 32], [0, 0, 0], [127, 42, -42]]
    assert found.scales.tolist() == pytest.approx([2 / 127, 1, 3e-3 / 127])


def test_int4_is_rounding_within_each_group():
    """By ten lines of its own."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((5, 70)).astype(np.float32)
    w[2, 32:64] = 0
    found = quantize_int4(w, 32)
    for n in range(5):
        for g in range(3):
            part = w[n, 32 * g : 32 * g + 32]
            extreme = part[np.argmax(np.abs(part))]
            d = np.float16(extreme / -8)
            levels = [max(-8, min(7, round(float(one) / float(d)))) if d else 0 for one in part]
            assert found.scales[n, g] == d
            assert found.q[n, 32 * g : 32 * g + 32].tolist() == levels


@pytest.mark.parametrize("group", [0, 16, 33, 256])
def test_other_groups_are_refused(group):
    with pytest.raises(ValueError, match=f"32, 64, 128, got {group}"):
        quantize_int4(np.zeros((1, 1), np.float32), group)
