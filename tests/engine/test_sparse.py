"""Sparse decode under the scheduler: dense where it must be, the same whatever runs beside it, and nobody else's business."""

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.architectures import MODELS
from tests.step_driver import make_driver, nobody_sparse
from tests.tiny_models import make_checkpoint
from vivace.engine import core, sparse
from vivace.engine.config import CacheConfig, Config, CpuConfig, SchedulerConfig, SparseConfig
from vivace.engine.events import EngineRequest, FinishReason, Sampling, Sparse
from vivace.kernels import backend
from vivace.kernels.backend import Backend

NUM_LAYERS = 4
KIND = Backend.CPU
DENSE = Sampling(0.0, 0, 1.0, 0.0, 0, 40, 0, (), 2, None)
SPARSE = replace(DENSE, sparse=Sparse(budget_tokens=128, min_context=0, layers_dense=1))
MEASURED = SparseConfig(min_kept_mass=0, measure_every=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", num_hidden_layers=NUM_LAYERS)


def make_engine(
    checkpoint,
    *,
    kind=KIND,
    blocks=256,
    chunk=512,
    running=8,
    settings=MEASURED,
    **cache,
):
    """Of 16 tokens a block has 4 * (2 * 2 * 16 * 4 * 16 + 2 * 2 * 16 * 2) bytes, of K and V and of what is known of them."""
    config = Config(
        model=checkpoint,
        backend=kind,
        scheduler=SchedulerConfig(max_step_tokens=chunk, max_running=min(running, chunk)),
        cache=CacheConfig(memory_bytes=blocks * NUM_LAYERS * 4224, **cache),
        cpu=CpuConfig(threads=1) if kind is Backend.CPU else CpuConfig(),
        sparse=settings,
    )
    return core.load(config, lambda done, total: None)


def prompt(seed, length=300):
    draw = random.Random(seed)
    return tuple(draw.randrange(3, 250) for _ in range(length))


def run(engine, *requests):
    """Tokens with their logprobs, to the last bit, and usage, of requests that run together: each a prompt and its sampling."""
    for i, (tokens, sampling) in enumerate(requests):
        engine.add(EngineRequest(str(i), tokens, sampling), 0.0)
    found = [([], []) for _ in requests]
    usages = [None] * len(requests)
    while engine.has_work:
        for event in engine.step(0.0):
            tokens, places = found[int(event.request_id)]
            tokens += event.token_ids
            places += event.logprobs
            usages[int(event.request_id)] = event.usage or usages[int(event.request_id)]
    assert engine.loads().num_blocks_used == 0 and engine._sparse.num_live == 0
    return found, usages


def alone(checkpoint, tokens, sampling, **settings):
    [found], [usage] = run(make_engine(checkpoint, **settings), (tokens, sampling))
    return found, usage


@pytest.fixture(scope="module")
def dense(checkpoint):
    return alone(checkpoint, prompt(1), DENSE)[0]


@pytest.fixture(scope="module")
def selected(checkpoint):
    found, usage = alone(checkpoint, prompt(1), SPARSE)
    assert usage.sparse_tokens == 39  # all but the one that the prompt's own step gives
    assert usage.num_measured == 1 + len([p for p in range(301, 339) if p % 8 == 0])
    assert 0 < usage.kept_mass < 1 and not usage.returned_to_dense
    return found


def test_selection_changes_the_tokens(dense, selected):
    """Or nothing below would prove anything."""
    assert dense[0][0] == selected[0][0] and dense[0] != selected[0]


@pytest.mark.parametrize("name", ["reference"])
def test_backends_agree(checkpoint, selected, name):
    found, _ = alone(checkpoint, prompt(1), SPARSE, kind=Backend(name))
    assert found[0] == selected[0]


@pytest.mark.parametrize(
    "rules",
    [
        Sparse(budget_tokens=352, min_context=0, layers_dense=1),  # never passed
        Sparse(budget_tokens=128, min_context=341, layers_dense=1),
        Sparse(budget_tokens=128, min_context=0, layers_dense=NUM_LAYERS),
    ],
)
def test_who_is_never_sparse_is_dense_bit_for_bit(checkpoint, dense, rules):
    found, usage = alone(checkpoint, prompt(1), replace(DENSE, sparse=rules))
    assert found == dense
    assert (usage.sparse_tokens, usage.kept_mass, usage.num_measured) == (0, None, 0)


@pytest.mark.parametrize(
    ("budget", "min_context", "count"), [(128, 0, 39), (128, 320, 20), (128, 339, 1), (320, 0, 19)]
)
def test_it_begins_past_the_budget_and_the_least_context(
    checkpoint, dense, budget, min_context, count
):
    """Contexts are of 301 .. 339 tokens; a budget of 20 units is passed with the 321st."""
    rules = Sparse(budget_tokens=budget, min_context=min_context, layers_dense=0)
    found, usage = alone(checkpoint, prompt(1), replace(DENSE, sparse=rules))
    assert usage.sparse_tokens == count
    first = 39 - count
    assert found[0][: first + 1] == dense[0][: first + 1]
    assert found[1][: first + 1] == dense[1][: first + 1]
    assert found[1] != dense[1]


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_the_chunk_size_changes_nothing(checkpoint, selected, chunk):
    assert alone(checkpoint, prompt(1), SPARSE, chunk=chunk)[0] == selected


def test_neighbours_change_nothing(checkpoint, dense, selected):
    """Dense and sparse ones, of other lengths, rules and chunks."""
    few = replace(SPARSE, sparse=Sparse(160, 0, 0), max_tokens=25)
    others = [(prompt(2, 250), SPARSE), (prompt(3, 40), SPARSE), (prompt(4, 280), few)]
    found, _ = run(
        make_engine(checkpoint, chunk=64),
        (prompt(1), DENSE),
        *others,
        (prompt(5, 200), DENSE),
        ((9, *prompt(1)), SPARSE),
        (prompt(1), SPARSE),
    )
    assert found[0] == dense and found[-1] == selected
    for got, (tokens, sampling) in zip(found[1:4], others, strict=True):
        assert got == alone(checkpoint, tokens, sampling)[0]


def test_what_is_known_of_a_block_is_not_believed_of_its_next_use(checkpoint):
    """Nine requests one after another in the blocks of one and a half."""
    engine = make_engine(checkpoint, blocks=33)
    assert engine.loads().num_blocks == 33
    for seed in range(9):
        [found], [usage] = run(engine, (prompt(seed), SPARSE))
        assert usage.cached_tokens == 0 and usage.sparse_tokens == 39
        assert found == alone(checkpoint, prompt(seed), SPARSE)[0]
    assert len(engine._sparse._made) <= 33


@pytest.mark.parametrize("first", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_a_prefix_hit_changes_nothing(checkpoint, selected, dense, first):
    """Blocks that a dense request computed get their metadata when it is needed, those of a sparse one have it."""
    engine = make_engine(checkpoint)
    run(engine, (prompt(1), first))
    made = []
    inputs = engine._sparse.inputs

    def seen(step):
        found = inputs(step)
        made.extend(found["meta_units"].tolist())
        return found

    engine._sparse.inputs = seen
    [found], [usage] = run(engine, (prompt(1), SPARSE))
    assert found == selected and usage.cached_tokens == 288
    assert len(made) == len(set(made)) == (21 if first is DENSE else 3)  # of 339 tokens
    assert run(engine, (prompt(1), DENSE))[0] == [dense]


def test_units_are_made_once_though_two_want_them_in_one_step(checkpoint, selected):
    engine = make_engine(checkpoint)
    run(engine, (prompt(1), replace(DENSE, max_tokens=1)))
    counts = []
    inputs = engine._sparse.inputs

    def seen(step):
        found = inputs(step)
        counts.extend(found["meta_units"].tolist())
        return found

    engine._sparse.inputs = seen
    found, _ = run(engine, (prompt(1), SPARSE), (prompt(1), SPARSE))
    assert found == [selected, selected]
    assert len(counts) == len(set(counts)) == 18 + 2 * 3


def test_who_waits_for_metadata_is_dense_until_it_has_all(checkpoint, selected, monkeypatch):
    """Four units a step: 19 take five steps."""
    monkeypatch.setattr(sparse, "MAX_META_UNITS", 4)
    found, usage = alone(checkpoint, prompt(1), SPARSE)
    assert usage.sparse_tokens == 39 - 3  # the step of the prompt makes the first
    assert found[0] != selected[0]


def test_what_was_computed_sparsely_is_never_found_as_a_prefix(checkpoint):
    engine = make_engine(checkpoint)
    [(tokens, _)], _ = run(engine, (prompt(1), replace(SPARSE, max_tokens=100)))
    longer = (*prompt(1), *tokens)
    for sampling in (DENSE, SPARSE):
        [found], [usage] = run(engine, (longer, sampling))
        assert usage.cached_tokens == (288 if sampling is DENSE else 384)
        assert found == alone(checkpoint, longer, sampling)[0]


def test_tokens_before_the_first_sparse_one_are_shared(checkpoint):
    engine = make_engine(checkpoint)
    late = replace(SPARSE, sparse=Sparse(128, 340, 1), max_tokens=100)
    [(tokens, _)], [usage] = run(engine, (prompt(1), late))
    assert usage.sparse_tokens == 60
    _, [usage] = run(engine, ((*prompt(1), *tokens), DENSE))
    assert usage.cached_tokens == 336


def test_preemption_leaves_dense_requests_exact_and_is_repeatable(checkpoint):
    """Short of blocks: what is computed again is a prompt, so a sparse request goes on as one that begins there would."""
    requests = [
        (prompt(i, 140 + 7 * i), replace(DENSE if i % 3 == 0 else SPARSE, max_tokens=90))
        for i in range(7)
    ]

    lost = {}  # which request -> the tokens that it had when it last lost its blocks

    def results(sharing):
        engine = make_engine(checkpoint, blocks=45, chunk=64, prefix_sharing=sharing)
        stop = engine._scheduler._stop_running

        def seen(request):
            if request.id in engine._scheduler._requests:  # else: it has ended
                lost[int(request.id)] = request.num_generated
            stop(request)

        engine._scheduler._stop_running = seen
        return run(engine, *requests)

    found, usages = results(True)
    assert sum(usage.num_preemptions for usage in usages) > 1
    assert any(usage.num_preemptions for usage in usages if usage.sparse_tokens)
    again = results(True)[0]
    assert found == again
    assert any(count and requests[i][1].sparse for i, count in lost.items())
    for i, count in lost.items():
        tokens, sampling = requests[i]
        reply = found[i][0]
        longer = (*tokens, *reply[:count])
        rest = replace(sampling, max_tokens=90 - count)
        assert alone(checkpoint, longer, rest)[0][0] == reply[count:]
    for got in (found, results(False)[0]):
        for i, (tokens, sampling) in enumerate(requests):
            if sampling.sparse is None or (got is found and not usages[i].num_preemptions):
                assert got[i] == alone(checkpoint, tokens, sampling)[0]
            assert len(got[i][0]) == 90


def test_random_traffic_gives_dense_requests_dense_tokens(checkpoint):
    """Prompts that go on where others' replies ended, in few blocks."""
    draw = random.Random(5)
    engine = make_engine(checkpoint, blocks=48, chunk=48, running=4)
    texts = [prompt(i, draw.randrange(100, 180)) for i in range(3)]
    num_cached = 0
    for _ in range(8):
        asked = []
        for _ in range(3):
            tokens = draw.choice(texts)
            count = draw.randrange(1, 60)
            asked.append((tokens, replace(draw.choice([DENSE, SPARSE]), max_tokens=count)))
        found, usages = run(engine, *asked)
        num_cached += sum(usage.cached_tokens for usage in usages)
        for (tokens, sampling), (reply, places) in zip(asked, found, strict=True):
            if sampling.sparse is None:
                assert (reply, places) == alone(checkpoint, tokens, sampling)[0]
            if len(tokens) < 300:
                texts.append((*tokens, *reply))
    assert num_cached > 0 and engine.loads().num_sparse_tokens > 100


def test_the_guard_returns_a_request_to_dense(checkpoint, dense, selected):
    """After its first sparse row; what follows is what dense steps from there give."""
    settings = SparseConfig(min_kept_mass=0.999)
    engine = make_engine(checkpoint, settings=settings)
    [found], [usage] = run(engine, (prompt(1), SPARSE))
    assert (usage.sparse_tokens, usage.num_measured, usage.returned_to_dense) == (1, 1, True)
    assert 0 < usage.kept_mass < 0.999
    loads = engine.loads()
    assert (loads.num_sparse_tokens, loads.num_measured_rows, loads.num_returned_to_dense) == (
        *(1, 1, 1),
    )
    assert loads.kept_mass_sum == usage.kept_mass
    assert found[0] not in (dense[0], selected[0])
    driver = make_driver(checkpoint, backend.load(KIND))
    request = driver.add(prompt(1), 400)
    tokens = []
    for i in range(40):
        select = {}
        if i == 1:
            units = np.array(request.blocks[: 301 // 16], np.int32)
            select = {"meta_units": units, "sparse_budgets": np.array([8], np.int32)}
            select["sparse_dense_layers"] = np.array([1], np.int32)
        logits = driver.step([(request, request.num_pending)], rows="last", select=select)
        tokens.append(int(logits.argmax()))
        request.tokens.append(tokens[-1])
    assert found[0] == tokens


def test_rows_are_measured_at_places_that_depend_on_the_request_alone(checkpoint):
    places = []
    engine = make_engine(checkpoint, settings=replace(MEASURED, measure_every=16))
    judge = engine._sparse.judge

    def seen(mass_B2):
        for row, _state in engine._sparse.measured:
            places.append(float(mass_B2[row, 1]))
        judge(mass_B2)

    engine._sparse.judge = seen
    _, usages = run(engine, (prompt(2), SPARSE), (prompt(1), SPARSE), (prompt(3), DENSE))
    for usage in usages[:2]:
        assert usage.num_measured == 4  # positions 300, the first, 304, 320 and 336
    assert set(places) == {NUM_LAYERS - 1}
    assert (
        usages[1].kept_mass
        == alone(checkpoint, prompt(1), SPARSE, settings=replace(MEASURED, measure_every=16))[
            1
        ].kept_mass
    )


def test_no_bound_means_no_return(checkpoint, selected):
    settings = SparseConfig(min_kept_mass=0)
    found, usage = alone(checkpoint, prompt(1), SPARSE, settings=settings)
    assert found == selected and not usage.returned_to_dense


def test_an_abort_at_any_stage_leaves_nothing(checkpoint):
    engine = make_engine(checkpoint, chunk=100)
    for i in range(3):
        engine.add(EngineRequest(str(i), prompt(i), SPARSE), 0.0)
    for i in range(3):
        engine.step(0.0)
        assert engine.abort(str(i), 0.0)
    events = engine.step(0.0)
    assert events[-1].finish is FinishReason.ABORT
    while engine.has_work:
        engine.step(0.0)
    assert engine._sparse.num_live == 0 and engine.loads().num_blocks_used == 0


@pytest.mark.parametrize("block_tokens", [4, 20, 64])
def test_blocks_of_other_sizes(checkpoint, block_tokens):
    """Units are whole blocks where 16 does not divide these, and parts of them where it does."""
    unit = 16 if block_tokens == 64 else block_tokens
    sampling = replace(SPARSE, sparse=Sparse(8 * unit, 0, 1))
    sizes = {"block_tokens": block_tokens, "blocks": 300}
    got = {
        kind: alone(checkpoint, prompt(1), sampling, kind=kind, **sizes)
        for kind in (Backend.CPU, Backend.REFERENCE)
    }
    [(tokens, _), usage], [(others, _), _] = got.values()
    assert tokens == others and usage.sparse_tokens == 39 and usage.kept_mass < 1


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_layers_with_a_window_stay_as_they_are(tmp_path, name):
    """Softcaps and sinks are theirs too."""
    kind, fields = MODELS[name]
    checkpoint = make_checkpoint(tmp_path, kind, **fields)
    sampling = replace(SPARSE, sparse=Sparse(128, 0, 0))
    config = Config(model=checkpoint, cpu=CpuConfig(threads=1), sparse=MEASURED)
    engine = core.load(config, lambda done, total: None)
    reference = core.load(
        replace(config, backend=Backend.REFERENCE, cpu=CpuConfig()), lambda done, total: None
    )
    (found, [usage]), (other, [its]) = (
        run(one, (prompt(1), sampling)) for one in (engine, reference)
    )
    assert found[0][0] == other[0][0] and usage.sparse_tokens == 39
    assert abs(usage.kept_mass - its.kept_mass) < 1e-3


def test_the_inputs_of_dense_steps_are_made_once(checkpoint):
    engine = make_engine(checkpoint)
    engine.add(EngineRequest("a", prompt(1, 5), DENSE), 0.0)
    step = engine._scheduler.step(0.0)
    first, second = (engine._sparse.inputs(step) for _ in range(2))
    want = nobody_sparse(1)
    for name, array in want.items():
        assert np.array_equal(first[name], array) and first[name].dtype == np.int32
        assert np.shares_memory(first[name], second[name]) or array.size == 0
