"""Block-sparse decode: metadata, scores, choice and attention right against fp64, exact where they must be, dense otherwise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.arrays import EVERYWHERE, ISAS, close, ops_of, out, run
from tests.kernels.paged import queries
from tests.kernels.sparse import Sparse, widened
from vivace.kernels.backend import Backend, load
from vivace.kernels.buffer import DType

UNWRITTEN = np.int32(~np.int32(0))
each_backend = pytest.mark.parametrize("backend", EVERYWHERE, ids=lambda one: one.value)
each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda one: one.value)
each_dtype = pytest.mark.parametrize(
    "dtype", (DType.FP32, DType.BF16, DType.INT8), ids=lambda one: one.value
)
each_block = pytest.mark.parametrize("block_tokens", (16, 48, 5))
LENGTHS, BUDGETS = (
    (200, 31, 145, 160, 0),
    (9, 0, 8, 10, 8),
)  # sparse, dense, sparse, just its budget, nobody


@each_backend
@each_dtype
@pytest.mark.parametrize(
    ("block_tokens", "D"), [(16, 16), (32, 10), (1, 8), (5, 7), (48, 64), (17, 3)]
)
def test_metadata_is_mean_and_deviation_of_what_the_cache_holds(backend, dtype, block_tokens, D):
    sparse = Sparse(ops_of(backend, 2), (70, 50), (0, 0), G=3, D=D, S=block_tokens, dtype=dtype)
    got, U = widened(sparse.ops.memory.read(sparse.meta)), sparse.U
    written = np.zeros(len(got), bool)
    for b, length in enumerate(sparse.lengths):
        count = length // U
        k = sparse.paged.k[b][: count * U].reshape(count, U, 3, D).astype(np.float64)
        want = np.stack((k.mean(1), k.std(1)), axis=2)
        places = sparse.places(b, count)
        close(got[places], want, 2**-8)  # bf16 has 8 bits
        written[places] = True
    assert written.any() and np.isnan(got[~written]).all()


@each_backend
def test_units_that_are_not_asked_for_keep_their_metadata(backend):
    sparse = Sparse(ops_of(backend), (80,), (0,))
    before = sparse.ops.memory.read(sparse.meta).copy()
    paged, unit = sparse.paged, int(sparse.tables[0, 2])
    k = queries(80, 2, 16, seed=1)
    paged.write(k, k, sparse.tables[0, np.arange(80) // 16] * 16 + np.arange(80) % 16)
    units = np.int32([-1, unit, -7])
    run(sparse.ops, "block_meta_update", [sparse.meta, paged.cache], units, block_tokens=16)
    after = sparse.ops.memory.read(sparse.meta)
    changed = np.unique(np.argwhere(before != after)[:, 0])
    assert changed.tolist() == [unit]
    run(sparse.ops, "block_meta_update", [sparse.meta, paged.cache], units[:0], block_tokens=16)
    assert np.array_equal(sparse.ops.memory.read(sparse.meta), after)


@each_backend
@each_block
@pytest.mark.parametrize(
    ("heads", "G", "D"), [(1, 2, 16), (4, 2, 64), (7, 1, 24), (3, 3, 7), (19, 1, 40)]
)
def test_scores_are_those_of_full_units_and_nobody_else_gets_any(
    backend, block_tokens, heads, G, D
):
    sparse = Sparse(ops_of(backend, 2), LENGTHS, BUDGETS, G=G, D=D, S=block_tokens)
    q = queries(len(LENGTHS), G * heads, D)
    got = sparse.score(q)
    for b, length in enumerate(LENGTHS):
        if not sparse.is_sparse(b):
            assert np.isnan(got[b]).all()
            continue
        rows, count = got[b].reshape(G, -1), length // sparse.U
        close(rows[:, :count], sparse.want_scores(q, b), 5e-6)
        assert (rows[:, count:] == -np.inf).all()


@each_isa
@pytest.mark.parametrize("threads", (1, 3))
def test_more_units_than_are_kept_between_two_passes(isa, threads):
    """The same as of fewer, which are."""
    ops, rng = ops_of(isa, threads), np.random.default_rng(0)
    S, X, H, D = 16, 20_001, 10, 8
    meta = (rng.standard_normal((X, 1, 2, D), dtype=np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    meta[:, :, 1] &= 0x7FFF
    q, table = (
        rng.standard_normal((1, H, D), dtype=np.float32),
        rng.permutation(X).astype(np.int32)[None],
    )
    requests = (table, *map(np.int32, ([0, 1], [X * S - 1], [1000], [0])))
    attrs = {"layer": 0, "block_tokens": S}
    [scores] = run(
        ops, "block_score", [out(ops, 1, 1, X, 1)], q, meta, *requests, scale=0.4, **attrs
    )
    of_table = widened(meta)[table[0], 0].astype(np.float64)
    s = (q[0] @ of_table[:, 0].T + abs(q[0]) @ of_table[:, 1].T) * 0.4
    want = (s - np.log(np.exp(s).sum(1, keepdims=True))).max(0)
    close(scores[0, 0, :-1, 0], want[:-1], 5e-6)
    selected, counts = (out(ops, *shape, dtype=np.int32) for shape in ((1, 1, X, 1), (1, 1)))
    run(ops, "block_topk", [selected, counts], scores, *requests[2:], **attrs)
    others = np.argsort(-scores[0, 0, 1:-4, 0], kind="stable")[: 1000 - 5] + 1
    assert counts.tolist() == [[1000]]
    assert selected[0, 0, :1000, 0].tolist() == [0, *sorted(others), *range(X - 4, X)]


@each_backend
@settings(max_examples=40)
@given(
    requests=st.lists(st.tuples(st.integers(0, 700), st.just(0) | st.integers(8, 40)), max_size=3),
    G=st.integers(1, 3),
    block_tokens=st.sampled_from((1, 5, 16, 32)),
    values=st.sampled_from(((0.0, -0.0, 1.0), (1.0, -np.inf, np.inf, np.nan), (np.nan, -np.inf), None)),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_choice_is_exact(backend, requests, G, block_tokens, values, seed):
    """Ties to the lower unit, what is no number last, the first and the last units whatever their scores."""
    ops, rng = ops_of(backend, 2), np.random.default_rng(seed)
    lengths, budgets = ([one[i] for one in requests] for i in (0, 1))
    sparse = Sparse(ops, [0] * len(lengths), budgets, G=G, D=2, S=block_tokens)
    sparse.lengths, sparse.lens = lengths, np.int32(lengths)  # the choice reads no cache
    sparse.tables = np.zeros((len(lengths), max(lengths, default=0) // block_tokens + 2), np.int32)
    scores = rng.standard_normal(sparse.shape, dtype=np.float32)
    if values is not None:
        scores = rng.choice(np.float32(values), sparse.shape)
    selected, counts = sparse.choose(scores)
    for b in range(len(lengths)):
        for g in range(G):
            row = selected[b, g].ravel()
            want = sparse.want_chosen(scores, b, g) if sparse.is_sparse(b) else []
            assert counts[b, g] == (len(want) if want else -1)
            assert row[: len(want)].tolist() == want and (row[len(want) :] == UNWRITTEN).all()


@each_backend
@each_dtype
@each_block
@pytest.mark.parametrize(
    ("heads", "softcap", "has_sinks"), [(2, 0.0, False), (1, 4.0, True), (26, 0.0, True)]
)
def test_attention_is_over_what_is_selected_and_reads_nothing_else(
    backend, dtype, block_tokens, heads, softcap, has_sinks
):
    sparse = Sparse(ops_of(backend, 2), LENGTHS[:4], BUDGETS[:4], S=block_tokens, dtype=dtype)
    q = queries(4, 2 * heads, 16)
    sinks = queries(1, 2 * heads, 1)[0, :, 0] if has_sinks else None
    selection = sparse.choose(sparse.score(q))
    kept = sparse.positions(selection)
    assert len(kept[0][0]) < 200 and len(kept[1][0]) == 31
    want = sparse.paged.want(q, (1,) * 4, sinks, softcap=softcap, kept=kept)
    sparse.forget_others(selection)
    multiplies_narrow = backend is Backend.TRITON and dtype is not DType.FP32  # in the cache's type
    tolerance = 1e-2 if multiplies_narrow else 4e-6
    close(sparse.attend(q, selection, sinks, softcap=softcap), want, tolerance)


@each_backend
@each_dtype
@pytest.mark.parametrize("block_tokens", (16, 64, 5))
def test_a_selection_of_all_units_gives_the_bits_of_none(backend, dtype, block_tokens):
    lengths = (600, 47, 530 if backend is Backend.TRITON else 2100)  # several splits of each
    sparse = Sparse(ops_of(backend, 2), lengths, (0, 0, 0), S=block_tokens, dtype=dtype)
    q = queries(3, 6, 16)
    selected = np.broadcast_to(
        np.arange(np.prod(sparse.shape[2:])).reshape(sparse.shape[2:]), sparse.shape
    )
    counts = [[-(-length // sparse.U)] * 2 for length in lengths]
    dense = sparse.attend(q)
    for some in (counts, [counts[0], [-1, -1], counts[2]], [[-1, -1]] * 3):
        selection = (np.ascontiguousarray(selected, np.int32), np.int32(some))
        assert np.array_equal(sparse.attend(q, selection), dense)


@each_backend
def test_below_its_budget_or_in_a_dense_layer_a_request_has_the_bits_of_dense_attention(backend):
    lengths, budgets, dense_layers = (600, 170, 128, 300), (64, 12, 8, 8), (0, 0, 0, 2)
    sparse = Sparse(ops_of(backend, 2), lengths, budgets, dense_layers=dense_layers)
    q = queries(4, 4, 16)
    dense, in_layer_0, in_layer_2 = (
        sparse.attend(q),
        sparse.step(q, layer=1),
        sparse.step(q, layer=2),
    )
    assert np.array_equal(in_layer_0, dense)  # 600 tokens are 38 units
    assert np.array_equal(in_layer_2[:3], dense[:3]) and not np.array_equal(in_layer_2[3], dense[3])
    counts = sparse.choose(sparse.score(q, 2), 2)[1]
    assert counts.tolist() == [[-1, -1]] * 3 + [[8, 8]]


@each_backend
@each_dtype
def test_what_was_known_of_a_block_is_not_believed_of_its_next_use(backend, dtype):
    """A request in the blocks of a longer one: its last unit is not full, and what is known of that place is the other's."""
    ops = ops_of(backend)
    fresh = Sparse(ops, (155,), (8,), dtype=dtype)
    used = Sparse(ops, (176,), (8,), seed=1, dtype=dtype)
    position, count = np.arange(155), 155 // 16
    used.lengths = used.paged.lengths = fresh.lengths
    used.lens = fresh.lens
    slots = used.tables[0, position // 16] * 16 + position % 16
    used.paged.write(fresh.paged.k[0], fresh.paged.v[0], slots)
    units = used.places(0, count).astype(np.int32)
    run(ops, "block_meta_update", [used.meta, used.paged.cache], units, block_tokens=16)
    stale = widened(ops.memory.read(used.meta))[used.places(0, 11)[count:]]
    assert np.isfinite(stale).all()
    q = queries(1, 4, 16)
    scores, want = used.score(q), fresh.score(q)
    assert np.array_equal(scores[:, :, :11], want) and (scores[:, :, count:] == -np.inf).all()
    assert np.array_equal(used.step(q), fresh.step(q))


@each_backend
def test_rows_of_nobody_are_zero_beside_a_selection(backend):
    sparse = Sparse(ops_of(backend), (200, 40), (8, 0))
    q = queries(5, 4, 16)
    selection = sparse.choose(sparse.score(q))
    assert selection[1].tolist() == [[8, 8], [-1, -1]]
    got = sparse.attend(q, selection)
    assert np.array_equal(got[:2], sparse.attend(q[:2], selection)) and (got[2:] == 0).all()


@each_backend
def test_requests_may_share_blocks_and_select_from_them(backend):
    sparse = Sparse(ops_of(backend), (200, 200), (8, 8))
    sparse.tables[1] = sparse.tables[0]
    q = queries(1, 4, 16)
    both = np.concatenate((q, q))
    scores, got = sparse.score(both), sparse.step(both)
    assert np.array_equal(scores[0], scores[1]) and np.array_equal(got[0], got[1])
    alone = Sparse(ops_of(backend), (200,), (8,))
    close(scores[0, :, :12, 0], alone.want_scores(q, 0), 5e-6)


@each_backend
def test_a_row_in_a_batch_is_the_row_alone(backend):
    lengths, budgets = (300, 500, 200), (9, 11, 0)
    together = Sparse(ops_of(backend, 2), lengths, budgets, D=64)
    q = queries(3, 4, 64)
    scores = together.score(q)
    whole = together.step(q)
    for b in range(3):
        part = slice(b, b + 1)
        together.lengths, together.lens = lengths[part], np.int32(lengths[part])
        together.budgets, together.dense_layers = np.int32(budgets[part]), np.int32([0])
        together.tables = together.paged.tables = together.paged.tables[part]
        together.starts, together.paged.lengths = np.int32([0, 1]), lengths[part]
        assert np.array_equal(together.score(q[part]), scores[part], equal_nan=True)
        assert np.array_equal(together.step(q[part]), whole[part])
        together = Sparse(ops_of(backend, 2), lengths, budgets, D=64)


@each_backend
def test_the_kept_mass_of_a_request_is_its_own(backend):
    """Bitwise, beside others and beside one that has no row and no context."""
    lengths, budgets = (145, 0, 160), (8, 8, 9)
    together = Sparse(ops_of(backend, 2), lengths, budgets)
    q = queries(3, 2, 16)
    whole = together.keep(q, together.choose(together.score(q)), (1, 0, 1))
    assert whole[1].tolist() == [0, 0] and (whole[[0, 2], 1] == 1).all()
    for b in (0, 2):
        alone = Sparse(ops_of(backend), lengths, budgets)
        part = slice(b, b + 1)
        alone.lengths, alone.lens = lengths[part], np.int32(lengths[part])
        alone.budgets, alone.dense_layers = np.int32(budgets[part]), np.int32([0])
        alone.tables, alone.starts = alone.tables[part], np.int32([0, 1])
        selection = alone.choose(alone.score(q[part]))
        assert np.array_equal(alone.keep(q[part], selection, (1,)), whole[part])


@each_backend
def test_a_step_without_requests_does_nothing(backend):
    sparse = Sparse(ops_of(backend), (), ())
    q = queries(0, 4, 16)
    assert sparse.step(q).shape == (0, 4, 16)
    selection = sparse.choose(sparse.score(q))
    assert sparse.keep(q, selection, []).shape == (0, 2)


@each_isa
@each_dtype
def test_threads_change_no_bit(isa, dtype):
    lengths, budgets = (5000, 300, 2500), (40, 9, 150)
    q = queries(3, 9, 16)
    found = []
    for threads in (1, 2, 4):
        sparse = Sparse(ops_of(isa, threads), lengths, budgets, G=3, dtype=dtype)
        scores = sparse.score(q)
        selection = sparse.choose(scores)
        parts = (
            sparse.meta,
            scores,
            *selection,
            sparse.attend(q, selection),
            sparse.keep(q, selection, (1, 0, 1)),
        )
        found.append([part.tobytes() for part in parts])
    assert found[0] == found[1] == found[2]


def test_backends_select_the_same_where_scores_are_well_apart():
    q, found = queries(2, 8, 64), []
    for backend in EVERYWHERE:
        sparse = Sparse(ops_of(backend), (900, 400), (12, 9), D=64, dtype=DType.BF16)
        selection = sparse.choose(sparse.score(q))
        found.append([rows for kept in sparse.positions(selection) for rows in kept])
    for one in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(one, found[0], strict=True))


@each_backend
@each_block
@pytest.mark.parametrize(("heads", "softcap", "has_before"), [(3, 0.0, True), (7, 5.0, False)])
def test_the_kept_mass_is_that_of_the_measured_requests(
    backend, block_tokens, heads, softcap, has_before
):
    sparse = Sparse(ops_of(backend, 2), LENGTHS[:4], BUDGETS[:4], S=block_tokens)
    q = 2 * queries(4, 2 * heads, 16)
    selection = sparse.choose(sparse.score(q))
    before = np.float32([[1, 2], [3, 4], [5, 6], [7, 8]]) if has_before else None
    got = sparse.keep(q, selection, (1, 1, 0, 1), before, softcap=softcap)
    want = np.zeros((4, 2)) if before is None else before.astype(np.float64)
    for b, kept in enumerate(sparse.positions(selection)):
        if b == 2 or not sparse.is_sparse(b):
            continue
        shares = []
        for g, rows in enumerate(q[b].reshape(2, heads, 16).astype(np.float64)):
            s = rows @ sparse.paged.k[b][:, g].T.astype(np.float64) / 4
            s = softcap * np.tanh(s / softcap) if softcap else s
            p = np.exp(s - s.max(1, keepdims=True))
            shares += (p[:, kept[g]].sum(1) / p.sum(1)).tolist()
        want[b] += (np.mean(shares), 1)
    assert 0.1 < want[0, 0] % 1 < 0.99
    close(got, want, 4e-6)


def test_a_replay_follows_its_sizes():
    """Recorded with room for three requests, run with fewer: what calls one by one give, to the bit."""
    ops = load(Backend.CPU, threads=2)
    lengths, budgets = (300, 500, 200), (9, 0, 8)
    sparse = Sparse(ops, lengths, budgets, D=64)
    q, view = queries(3, 4, 64), ops.memory.view
    meta = sparse.meta.copy()
    units = np.concatenate([sparse.places(b, n // 16) for b, n in enumerate(lengths)]).astype(
        np.int32
    )
    outs = [
        out(ops, *sparse.shape), out(ops, *sparse.shape, dtype=np.int32),
        out(ops, *sparse.shape[:2], dtype=np.int32), out(ops, *q.shape), out(ops, 3, 2),
    ]  # fmt: skip
    (scores, _, _, attended, _), measured = outs, np.ones(3, np.int32)

    def layer(sizes):
        B, num_units = sizes
        first = [view(one, (B, *one.shape[1:])) for one in (*outs, q, sparse.tables)]
        requests = [view(one, (B,)) for one in (sparse.lens, sparse.budgets, sparse.dense_layers)]
        starts, attrs = view(sparse.starts, (B + 1,)), {"layer": 0, "block_tokens": 16}
        part_scores, part_selected, part_counts, part_out, part_mass, rows, tables = first
        ops.block_meta_update(meta, sparse.paged.cache, view(units, (num_units,)), block_tokens=16)
        ops.block_score(part_scores, rows, meta, tables, starts, *requests, scale=0.125, **attrs)
        ops.block_topk(part_selected, part_counts, part_scores, *requests, **attrs)
        heads = {"num_kv_heads": 2, "scale": 0.125}
        into = (rows, sparse.paged.cache, tables, starts, requests[0])
        ops.attention(part_out, *into, None, part_selected, part_counts, **heads)
        ops.kept_mass(part_mass, *into, part_selected, part_counts, view(measured, (B,)), **heads)

    replay = ops.recorder.record(layer, (3, len(units)))
    assert np.isnan(attended).all() and np.isnan(scores).all()
    for B in (3, 0, 1, 2):
        meta[:] = 0xFFFF
        found = []
        for go in (replay.run, layer):
            for one in outs:
                one[:] = np.nan if one.dtype == np.float32 else UNWRITTEN
            go((B, len(units)))
            found.append([one.tobytes() for one in outs])
        assert found[0] == found[1]
        assert np.array_equal(meta, sparse.meta)
        assert not np.isnan(attended[:B]).any() and np.isnan(attended[B:]).all()
