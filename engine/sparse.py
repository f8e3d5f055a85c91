"""Which requests decode sparsely in a step, and what that takes; off the path of all others. Holds no tensors.

A request is sparse in a step if it is asked to be, decodes (so that it has one row), its context, this token included, is as
long as its rules say and longer than its budget, and all full units of it have metadata. This is made in the first step that
needs it, whoever computed the block, and what is known of a block holds for one use of it (`BlockPool.use`): what another
request wrote there before is never taken for one's own.

The recall guard: of some rows the share of attention that the selection keeps is measured. Which ones depends on the request
alone: its first sparse row, and those at every so-manieth position. Below the bound a request is dense from there on.
"""

from typing import Any

import numpy as np

from vivace.engine.blocks import BlockPool
from vivace.engine.config import Config, SparseConfig
from vivace.engine.errors import ConfigError
from vivace.engine.events import Sparse, SparseLimits
from vivace.engine.models.spec import ModelSpec
from vivace.engine.request import Request, SparseState
from vivace.engine.scheduler import Step
from vivace.kernels.selection import MIN_BUDGET_UNITS, unit_tokens

Array = np.ndarray[Any, Any]

MAX_META_UNITS = (
    4096  # made in a step: as much of K is read for them; who needs more is dense until then
)
DEFAULT_BUDGET_TOKENS = 2048  # of a request that asks for sparse decode and leaves it open


def sparse_limits(config: Config, spec: ModelSpec, block_tokens: int) -> SparseLimits | None:
    """What requests may ask for; None if the model has no layer without a window. Raises ConfigError for a bad default."""
    settings, unit = config.sparse, unit_tokens(block_tokens)
    least, budget = MIN_BUDGET_UNITS * unit, settings.budget_tokens
    if budget is not None and budget < least:
        raise ConfigError(
            f"sparse.budget_tokens must be at least {least}, {MIN_BUDGET_UNITS} units of {unit} "
            f"tokens with cache.block_tokens = {block_tokens}, got {budget}"
        )
    full = [i for i, layer in enumerate(spec.layers) if layer.attention.window is None]
    if not full:
        return None
    unset = Sparse(
        budget or max(DEFAULT_BUDGET_TOKENS, least),
        settings.min_context,
        settings.layers_dense,
    )
    return SparseLimits(unset if budget else None, unset, least, full[-1] + 1)


class SparseDecode:
    """One engine's. The engine loop is its only caller."""

    def __init__(
        self,
        config: SparseConfig,
        pool: BlockPool,
        limits: SparseLimits | None,
        *,
        block_tokens: int,
        max_running: int,
    ) -> None:
        self._config = config
        self._pool = pool
        self._num_layers = 0 if limits is None else limits.num_layers
        self._unit = unit_tokens(block_tokens)
        self._block_units = block_tokens // self._unit
        self._made: dict[
            int, tuple[int, int]
        ] = {}  # block -> its use, and leading units made in it
        self._zeros = np.zeros(max_running, np.int32)
        self.num_live = 0  # requests that may become sparse
        self.measured: list[tuple[int, SparseState]] = []  # rows of the last step
        self.num_tokens = self.num_measured = self.num_returned = 0
        self.kept_mass_sum = 0.0

    def inputs(self, step: Step) -> dict[str, Array]:
        """Of the step's program. `measured` then says whose kept mass `judge` wants to see."""
        self.measured = []
        zeros_B = self._zeros[: len(step.decoding) + len(step.chunks)]
        budgets_B = dense_layers_B = measured_B = zeros_B
        units: list[int] = []
        if self.num_live:
            budgets_B, dense_layers_B, measured_B = (zeros_B.copy() for _ in range(3))
            for i, request in enumerate(step.decoding):
                state = request.sparse
                if state is None or not self._can_select(request, request.num_computed + 1, units):
                    continue
                budgets_B[i] = state.rules.budget_tokens // self._unit
                dense_layers_B[i] = state.rules.layers_dense
                measured_B[i] = self._note(i, state, request.num_computed)
            for chunk in step.chunks:
                self._can_select(chunk.request, chunk.end, units)
        return {
            "meta_units": np.array(units, np.int32),
            "sparse_budgets": budgets_B,
            "sparse_dense_layers": dense_layers_B,
            "sparse_measured": measured_B,
        }

    def judge(self, mass_B2: Array) -> None:
        """What was kept of the rows that were measured."""
        for i, state in self.measured:
            kept = float(mass_B2[i, 0] / mass_B2[i, 1])
            state.num_measured += 1
            state.kept_mass_sum += kept
            self.num_measured += 1
            self.kept_mass_sum += kept
            if kept < self._config.min_kept_mass:
                state.is_returned = True
                self.num_returned += 1

    def _can_select(self, request: Request, context: int, units: list[int]) -> bool:
        """Whether a token with this much context can be sparse. Adds what must be made for it to `units`."""
        state = request.sparse
        if state is None or state.is_returned or state.rules.layers_dense >= self._num_layers:
            return False
        budget = state.rules.budget_tokens // self._unit
        if context < state.rules.min_context or -(-context // self._unit) <= budget:
            return False
        Z = self._block_units
        while state.num_units < context // self._unit:
            block, part = request.blocks[state.num_units // Z], state.num_units % Z
            use, num_made = self._made.get(block, (0, 0))
            if use != self._pool.use(block) or num_made <= part:
                if len(units) == MAX_META_UNITS:
                    return False
                units.append(block * Z + part)
                self._made[block] = self._pool.use(block), part + 1
            state.num_units += 1
        return True

    def _note(self, row: int, state: SparseState, position: int) -> bool:
        """Record a sparse row; returns whether it is measured."""
        is_measured = state.first_position is None or position % self._config.measure_every == 0
        if state.first_position is None:
            state.first_position = position
        state.num_tokens += 1
        self.num_tokens += 1
        if is_measured:
            self.measured.append((row, state))
        return is_measured
