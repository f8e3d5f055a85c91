"""Every backend of the ops that go row by row agrees with fp64, on awkward shapes, and no row depends on another."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.arrays import BACKENDS, EVERYWHERE, close, ops_of, out, run
from vivace.kernels.backend import Backend
from vivace.kernels.buffer import DType
from vivace.kernels.gated import ACTIVATIONS

ROWS = (0, 1, 2, 3, 4, 5, 7, 33, 70)  # below, at and past the tiles of rows
WIDTHS = ((1, 1), (5, 3), (16, 64), (33, 45), (130, 17))
EPS = 1e-6

each_backend = pytest.mark.parametrize("backend", EVERYWHERE, ids=lambda one: one.value)


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def norm64(x, weight, eps=EPS):
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@each_backend
@pytest.mark.parametrize("T", ROWS)
@pytest.mark.parametrize(("N", "K"), WIDTHS)
@pytest.mark.parametrize("has_bias", (False, True))
def test_linear(backend, T, N, K, has_bias):
    rng = np.random.default_rng(T * 1000 + N)
    ops, x, w = ops_of(backend, 2), normal(rng, T, K), normal(rng, N, K)
    bias = normal(rng, N) if has_bias else None
    [got] = run(ops, "linear", [out(ops, T, N)], x, w, bias)
    want = x.astype(np.float64) @ w.T.astype(np.float64)
    close(got, want + bias if has_bias else want)


@each_backend
@pytest.mark.parametrize("T", (1, 3, 6, 129))
@pytest.mark.parametrize(("N", "K"), ((13, 1024), (19, 1025), (7, 2100), (25, 31)))
def test_linear_over_blocks_of_inputs_and_tiles_of_outputs(backend, T, N, K):
    rng = np.random.default_rng(T + N)
    ops, x, w = ops_of(backend, 2), normal(rng, T, K), normal(rng, N, K)
    [got] = run(ops, "linear", [out(ops, T, N)], x, w)
    close(got, x.astype(np.float64) @ w.T.astype(np.float64), 4e-6)


@each_backend
@settings(max_examples=40)
@given(
    T=st.integers(1, 20) | st.just(133),
    N=st.integers(1, 70),
    K=st.integers(1, 300) | st.just(172) | st.just(1030),
    is_bf16=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_shape_of_a_projection_is_different(backend, T, N, K, is_bf16, has_bias, seed):
    rng = np.random.default_rng(seed)
    ops, x, w = ops_of(backend, 2), normal(rng, T, K), normal(rng, N, K)
    stored = as_bf16(w) if is_bf16 else w
    bias = normal(rng, N) if has_bias else None
    [got] = run(ops, "linear", [out(ops, T, N)], x, stored, bias)
    if is_bf16 and backend is Backend.TRITON:  # a product of bf16
        x = widened(rounded(x))
    read = (widened(stored) if is_bf16 else w).astype(np.float64)
    want = x.astype(np.float64) @ read.T + (bias if has_bias else 0)
    most = (np.abs(x).astype(np.float64) @ np.abs(read).T).max()  # sums may cancel
    assert np.abs(got - want).max() <= 1e-6 * (most + 3)


def as_bf16(x):
    """The upper halves of fp32."""
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def rounded(x):
    """The nearest bf16, halves to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda one: one.value)
@pytest.mark.parametrize("T", (1, 3, 5, 70))
@pytest.mark.parametrize(("N", "K"), (*WIDTHS, (11, 1040)))
def test_a_bf16_weight_is_an_fp32_one_that_ends_in_zeros(backend, T, N, K):
    rng = np.random.default_rng(T * 1000 + N)
    ops, x, bias = ops_of(backend, 2), normal(rng, T, K), normal(rng, N)
    w = as_bf16(normal(rng, 3, N, K))
    experts = rng.permuted(np.tile(np.int32([0, 1, 2]), (T, 1)), axis=1)[:, :2]
    results = []
    for weight in (w, widened(w)):
        [projected] = run(ops, "linear", [out(ops, T, N)], x, weight[0], bias)
        [embedded] = run(ops, "embed", [out(ops, 2, K)], np.int32([N - 1, 0]), weight[1], scale=1.7)
        [chosen] = run(ops, "expert_linear", [out(ops, T, 2, N)], x, experts, weight)
        results.append((projected, embedded, chosen))
    for got, want in zip(*results, strict=True):
        close(got, want, 1e-6)
        assert backend is Backend.REFERENCE or np.array_equal(got, want)  # torch minds alignment
    close(results[0][0], x.astype(np.float64) @ widened(w[0]).T.astype(np.float64) + bias, 4e-6)


@each_backend
def test_bf16_comes_back_as_it_went(backend):
    memory = ops_of(backend).memory
    bits = np.uint16([0, 1, 0x3F80, 0xFF80, 0x7FC0])
    assert memory.read(memory.upload(bits)).tolist() == bits.tolist()
    assert memory.read(memory.empty((3,), DType.BF16)).dtype == np.uint16


@each_backend
def test_a_weight_of_another_type_is_refused(backend):
    ops = ops_of(backend)
    with pytest.raises(ValueError, match=r"weight must hold float32 or bfloat16.*got .*int32"):
        ops.linear(out(ops, 1, 2), out(ops, 1, 3), out(ops, 2, 3, dtype=np.int32))


def test_the_bias_is_added_last():
    """After 2^24 and -2^24 have cancelled; before, it would be lost."""
    ops, x = ops_of(Backend.CPU), np.float32([[2**24, 0, 0, 0, -(2**24)]] * 5)
    [got] = run(
        ops, "linear", [out(ops, 5, 3)], x, np.ones((3, 5), np.float32), np.float32([1, 2, 3])
    )
    assert got.tolist() == [[1, 2, 3]] * 5


@each_backend
@pytest.mark.parametrize("T", ROWS)
@pytest.mark.parametrize("M", (1, 3, 16, 45, 128))
def test_norms(backend, T, M):
    rng = np.random.default_rng(T + M)
    ops, x, other, weight = ops_of(backend, 2), normal(rng, T, M), normal(rng, T, M), normal(rng, M)
    [got] = run(ops, "rmsnorm", [out(ops, T, M)], x, weight, eps=EPS)
    close(got, norm64(x, weight))
    outs = [out(ops, T, M), out(ops, T, M)]
    total, normed = run(ops, "add_rmsnorm", outs, x, other, weight, eps=EPS)
    assert np.array_equal(total, x + other)
    close(normed, norm64(total, weight))


@each_backend
def test_the_norm_is_right_over_the_whole_range_of_magnitudes(backend):
    """Its 1/sqrt is our own polynomial."""
    ops = ops_of(backend)
    x = np.outer(np.logspace(-15, 15, 301, dtype=np.float32), np.ones(4, np.float32))
    [got] = run(ops, "rmsnorm", [out(ops, 301, 4)], x, np.ones(4, np.float32), eps=1e-30)
    want = norm64(x, np.ones(4), eps=1e-30)
    assert (np.abs(got - want) <= 4e-7 * np.abs(want)).all()


@each_backend
@pytest.mark.parametrize("T", (0, 1, 5, 130))
def test_embed_and_take_rows_copy_rows(backend, T):
    rng = np.random.default_rng(T)
    ops, table = ops_of(backend, 2), normal(rng, 11, 7)
    which = rng.integers(0, 11, T).astype(np.int32)
    [got] = run(ops, "embed", [out(ops, T, 7)], which, table)
    assert np.array_equal(got, table[which])
    [got] = run(ops, "embed", [out(ops, T, 7)], which, table, scale=3.5)
    assert np.array_equal(got, table[which] * np.float32(3.5))
    [got] = run(ops, "take_rows", [out(ops, T, 7)], table, which)
    assert np.array_equal(got, table[which])
    table[3] = 0
    [got] = run(ops, "embed", [out(ops, T, 7)], which, as_bf16(table))
    assert np.array_equal(got, widened(as_bf16(table))[which])


R = object()  # marks the arrays of a call that have a row per token, by standing before them
CALLS = [  # op, shapes of the outputs' rows, inputs (shape of a row or of the whole), attributes
    ("linear", [(33,)], [(R, 45), (33, 45)], {}),
    ("linear", [(33,)], [(R, 45), (33, 45), (33,)], {}),
    ("linear", [(13,)], [(R, 1100), (13, 1100)], {}),
    ("rmsnorm", [(45,)], [(R, 45), (45,)], {"eps": EPS}),
    ("add_rmsnorm", [(45,), (45,)], [(R, 45), (R, 45), (45,)], {"eps": EPS}),
    *(("gated", [(45,)], [(R, 90)], {"activation": name}) for name in ACTIVATIONS),
    ("gated", [(3, 15)], [(R, 3, 30)], {}),
    ("softcap", [(45,)], [(R, 45)], {"cap": 2.0}),
    ("add", [(45,)], [(R, 45), (R, 45)], {}),
    ("moe_combine", [(45,)], [(R, 3, 45), (R, 3), (R, 45), (R, 1)], {}),
]


@pytest.mark.parametrize("threads", (1, 2, 4))
@pytest.mark.parametrize(("op", "outs", "ins", "attrs"), CALLS)
def test_no_row_depends_on_its_neighbours_or_the_threads(threads, op, outs, ins, attrs):
    """Bitwise, on the CPU backend: a row alone, in a small batch and in a large one."""
    rng, T = np.random.default_rng(0), 70
    inputs = [normal(rng, *(T if size is R else size for size in shape)) for shape in ins]
    compare_slices(of_cpu(threads), op, outs, inputs, [R in shape for shape in ins], attrs)


@pytest.mark.triton
@pytest.mark.parametrize(("op", "outs", "ins", "attrs"), CALLS)
def test_no_row_depends_on_its_neighbours_in_triton(op, outs, ins, attrs):
    """Bitwise. Projections of whole numbers, in fp32 and bf16: NumPy's products, which the interpreter takes, are not."""
    rng, T = np.random.default_rng(0), 70
    inputs = [normal(rng, *(T if size is R else size for size in shape)) for shape in ins]
    rows, both = [R in shape for shape in ins], [ops_of(Backend.TRITON)] * 2
    if op == "linear":
        inputs = [np.rint(4 * x) for x in inputs]
        compare_slices(both, op, outs, inputs, rows, attrs)
        inputs[1] = as_bf16(inputs[1])
    compare_slices(both, op, outs, inputs, rows, attrs)


@pytest.mark.parametrize("threads", (1, 2, 4))
@pytest.mark.parametrize("scoring", ("softmax", "sigmoid"))
@pytest.mark.parametrize("renormalize", (False, True))
def test_no_token_depends_on_where_the_others_go(threads, scoring, renormalize):
    """Bitwise: routing in groups, and the experts' projections."""
    rng, T, E, K = np.random.default_rng(0), 70, 12, 3
    inputs = [normal(rng, T, E), None, normal(rng, E)]
    groups = {"num_groups": 4, "top_groups": 2}
    attrs = {"scoring": scoring, "renormalize": renormalize, **groups}
    outs = [(K,), (K, np.int32)]
    _, experts = compare_slices(
        of_cpu(threads), "moe_route", outs, inputs, (True, False, False), attrs
    )
    for x in (normal(rng, T, 45), normal(rng, T, K, 45)):
        inputs = [x, experts, normal(rng, E, 33, 45), normal(rng, E, 33)]
        rows = (True, True, False, False)
        compare_slices(of_cpu(threads), "expert_linear", [(K, 33)], inputs, rows, {})


@pytest.mark.triton
@pytest.mark.parametrize("scoring", ("softmax", "sigmoid"))
def test_no_token_s_experts_depend_on_its_neighbours_in_triton(scoring):
    rng = np.random.default_rng(0)
    inputs = [normal(rng, 70, 12), None, normal(rng, 12)]
    attrs = {"scoring": scoring, "renormalize": True, "num_groups": 4, "top_groups": 2}
    both, outs = [ops_of(Backend.TRITON)] * 2, [(3,), (3, np.int32)]
    compare_slices(both, "moe_route", outs, inputs, (True, False, False), attrs)


def of_cpu(threads):
    """The ops of one thread, and of several."""
    return ops_of(Backend.CPU), ops_of(Backend.CPU, threads)


def compare_slices(both, op, outs, inputs, has_rows, attrs):
    """Run all rows with the second ops, then some of them alone with the first. Returns the outputs of all."""

    def call(ops, start, end):
        parts = [x[start:end] if rows else x for x, rows in zip(inputs, has_rows, strict=True)]
        buffers = [
            out(ops, end - start, *(n for n in shape if isinstance(n, int)),
                dtype=np.int32 if np.int32 in shape else np.float32)
            for shape in outs
        ]  # fmt: skip
        return run(ops, op, buffers, *parts, **attrs)

    alone, many = both
    whole = call(many, 0, len(inputs[0]))
    for start, end in ((0, 1), (13, 14), (3, 10), (63, 66), (69, 70), (5, 68)):
        for part, all_rows in zip(call(alone, start, end), whole, strict=True):
            assert np.array_equal(part, all_rows[start:end])
    return whole
