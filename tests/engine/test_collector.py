"""`engine/collector.py`: what is there when a process begins to serve is never looked at again."""

import subprocess
import sys

SETTLE = """
import gc
from vivace.engine import collector
lasting = [[] for _ in range(1000)]
collector.settle()
seen = {id(found) for found in gc.get_objects()}
print(sum(id(one) in seen for one in lasting), gc.isenabled(), gc.get_threshold()[2])
"""


def test_what_lasts_is_not_collected_and_full_collections_are_rare():
    done = subprocess.run(
        [sys.executable, "-c", SETTLE], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "True", "1000"]


TRIM = """
from pathlib import Path
from vivace.engine import collector
def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])
small = [bytes(2000) for _ in range(20_000)]  # from the heap, which the last one holds open
last = bytes(2000)
del small
before = resident()
collector.settle()
print(before - resident())
"""


def test_memory_that_loading_has_freed_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", TRIM], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 20_000_000
