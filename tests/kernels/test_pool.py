"""The threads of the CPU backend share the machine with others."""

import os
import subprocess
import sys
import time
from statistics import median

import numpy as np
import pytest

from vivace.kernels.backend import Backend, load

NUM_OPS, NUM_RUNS = 300, 20
MOST_TIMES = 5


def typical_s(threads):
    """Of a replay of many small ops, each of which all threads share."""
    ops = load(Backend.CPU, threads=threads)
    x, weight, y = (np.zeros(shape, np.float32) for shape in ((8, 256), (256, 256), (8, 256)))

    def call(_sizes):
        for _ in range(NUM_OPS):
            ops.linear(y, x, weight)

    replay = ops.recorder.record(call, (1,))
    times = []
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        replay.run([1])
        times.append(time.perf_counter() - start)
    return median(times)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="has one CPU")
def test_a_busy_process_on_every_cpu_does_not_stop_the_threads_from_working_together():
    """Would each op wait for a thread whose CPU another process has, each would take a slice of time of the kernel's: the
    whole some hundred times as long."""
    words = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    pipe = subprocess.PIPE
    busy = [subprocess.Popen(words, stdout=pipe) for _ in os.sched_getaffinity(0)]
    try:
        for process in busy:
            process.stdout.readline()
        alone, together = typical_s(1), typical_s(2)
    finally:
        for process in busy:
            process.kill()
            process.communicate()
    assert together < MOST_TIMES * alone
