"""What the bookkeeping of a decode step costs in plain Python: the floor that the real path is measured against."""

from typing import Any

import numpy as np


class HostFloor:
    """Per request: append a token, count, test for a full block, store position, slot and token."""

    def __init__(self, num_requests: int) -> None:
        self._tokens: list[list[int]] = [[0] for _ in range(num_requests)]
        self._num_computed = [0] * num_requests
        self._arrays: list[np.ndarray[Any, Any]] = [
            np.zeros(num_requests, np.int32) for _ in range(3)
        ]

    def step(self) -> int:
        """One step; returns how many blocks became full."""
        positions, slots, last = self._arrays
        num_full = 0
        for i, tokens in enumerate(self._tokens):
            tokens.append(7)
            count = self._num_computed[i] + 1
            self._num_computed[i] = count
            if count % 16 == 0:
                num_full += 1
            positions[i] = count
            slots[i] = count
            last[i] = 7
        return num_full
