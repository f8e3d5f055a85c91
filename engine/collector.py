"""Keeps Python's garbage collector from stopping a process that serves: a full collection looks at every object there is,
and with a thousand requests waiting it took 100-300 ms on two busy cores.

A request leaves no reference cycles behind, so full collections find next to nothing; they are made rare, not switched off.

Gives back what loading took and no longer needs, too: of a tokenizer with 150,000 tokens glibc keeps 18 MB.
"""

import ctypes
import gc
from contextlib import suppress

MIDDLE_COLLECTIONS = (
    1000  # of the youngest two generations for each full one; Python's default is 10
)


def settle() -> None:
    """Call when everything that lasts as long as the process has been made: it is not looked at again."""
    gc.collect()
    gc.freeze()
    with suppress(AttributeError):  # a C library that is not glibc
        ctypes.CDLL(None).malloc_trim(0)
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, MIDDLE_COLLECTIONS)
