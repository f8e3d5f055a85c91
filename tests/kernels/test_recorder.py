"""Recorded ops: refused unless all that varies is known, not run when recorded, run as one call."""

from threading import Event, Thread

import numpy as np
import pytest

from vivace.kernels.backend import Backend, load
from vivace.kernels.buffer import DType

MOST = (8, 6)  # of the two sizes of these tests


@pytest.fixture
def ops():
    return load(Backend.CPU, threads=2)


@pytest.fixture
def x(ops):
    buffer = ops.memory.empty((200, 1), DType.FP32)
    buffer[:] = np.arange(200)[:, None]
    return buffer


@pytest.fixture
def out(ops):
    buffer = ops.memory.empty((200, 1), DType.FP32)
    buffer[:] = np.nan
    return buffer


def test_fields_follow_the_sizes(ops, x, out):
    def scale(sizes):
        rows = 2 * sizes[0] + sizes[1] + 1
        view = ops.memory.view
        ops.softcap(view(out.reshape(-1), (rows, 3)), view(x.reshape(-1), (rows, 3)), cap=30.0)

    replay = ops.recorder.record(scale, MOST)
    assert np.isnan(out).all()  # nothing has run
    for sizes in ([0, 0], [8, 6], [3, 1], [8, 6], [1, 5]):
        out[:] = np.nan
        replay.run(sizes)
        count = (2 * sizes[0] + sizes[1] + 1) * 3
        want = ops.memory.empty((count, 1), DType.FP32)
        ops.softcap(want, x[:count], cap=30.0)
        assert np.array_equal(out[:count], want) and np.isnan(out[count:]).all()


@pytest.mark.parametrize(
    "count",
    [
        lambda a, b: a * b,
        lambda a, b: a * a,
        lambda a, b: -(-a // 3),
        lambda a, b: max(a, b),
        lambda a, b: min(a, 2),
    ],
    ids=["product", "square", "quotient", "maximum", "minimum"],
)
def test_what_follows_the_sizes_in_another_way_is_refused(ops, x, out, count):
    def call(sizes):
        size = count(*sizes)
        ops.softcap(out[:size], x[:size], cap=1.0)

    with pytest.raises(ValueError, match=r"count of softcap must be constant \+ factor \* size"):
        ops.recorder.record(call, MOST)


def test_memory_and_numbers_that_vary_are_refused(ops, x, out):
    with pytest.raises(ValueError, match="x of softcap must be constant"):
        ops.recorder.record(lambda sizes: ops.softcap(out[:3], x[sizes[0] :][:3], cap=1.0), MOST)
    with pytest.raises(ValueError, match="cap of softcap must be constant"):
        ops.recorder.record(lambda sizes: ops.softcap(out, x, cap=1.0 + sizes[1]), MOST)


def test_ops_that_vary_are_refused(ops, x, out):
    def call(sizes):
        for _ in range(1 + sizes[0]):
            ops.softcap(out, x, cap=1.0)

    with pytest.raises(ValueError, match="other ops, or another order, at other sizes"):
        ops.recorder.record(call, MOST)


def test_contracts_are_checked_when_recorded(ops, x, out):
    with pytest.raises(ValueError, match=r"must be \[4, 1\], got \[3, 1\]"):
        ops.recorder.record(lambda _sizes: ops.softcap(out[:3], x[:4], cap=1.0), MOST)
    ops.softcap(out[:3], x[:3], cap=1.0)  # a refused recording leaves ops as they were
    assert not np.isnan(out[:3]).any()


def test_an_empty_recording_runs_only_what_follows(ops, x, out):
    replay = ops.recorder.record(lambda sizes: None, MOST)
    replay.run([1, 2])
    replay.run([1, 2], lambda: ops.softcap(out[:5], x[:5], cap=1.0))
    assert not np.isnan(out[:5]).any() and np.isnan(out[5:]).all()


def test_progress_is_seen_from_another_thread_while_a_replay_runs(ops):
    """A watchdog must see ops finish: one call runs them all, with the GIL released."""
    memory = ops.memory
    x, weight = memory.empty((64, 512), DType.FP32), memory.empty((512, 512), DType.FP32)
    y = memory.empty((64, 512), DType.FP32)
    x[:], weight[:] = 1, 0

    def call(_sizes):
        for _ in range(300):
            ops.linear(y, x, weight)

    replay = ops.recorder.record(call, MOST)
    before, seen, stop = ops.progress(), set(), Event()

    def watch():
        while not stop.is_set():
            seen.add(ops.progress() - before)

    watchdog = Thread(target=watch)
    watchdog.start()
    while not any(count % 300 for count in seen):  # one run may end before the other begins
        replay.run([1, 1])
    stop.set()
    watchdog.join()
    done = ops.progress() - before
    assert done > 0 and done % 300 == 0


def test_another_backend_has_no_recorder():
    assert load(Backend.REFERENCE).recorder is None


def test_a_profile_runs_the_ops_and_says_how_long_each_took(ops, x, out):
    view = ops.memory.view

    def square(sizes):
        rows = (sizes[0], 3)
        ops.add(view(out.reshape(-1), rows), view(x.reshape(-1), rows), view(x.reshape(-1), rows))

    replay = ops.recorder.record(square, MOST)
    last = view(out[24:].reshape(-1), (2, 3))
    times = replay.profile([8, 0], lambda: ops.softcap(last, view(x.reshape(-1), (2, 3)), cap=30.0))
    assert [name for name, _ in times] == ["add", "softcap"]
    assert all(0 < seconds < 60 for _, seconds in times)
    assert np.array_equal(out[:24], 2 * x[:24]) and not np.isnan(last).any()
    assert np.isnan(out[30:]).all()
