"""Requests that select units of their contexts, and what the ops of block-sparse decode should give, in fp64."""

import numpy as np

from tests.kernels.arrays import out, run
from tests.kernels.paged import Paged
from vivace.kernels.buffer import DType
from vivace.kernels.selection import RECENT_UNITS, SINK_UNITS, unit_tokens

ARGUMENTS = ("tables", "starts", "lens", "budgets", "dense_layers")


def widened(bits):
    """What bf16 holds, from its bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Sparse:
    """One row each of several requests. The metadata of all full units is there, of others NaN."""

    def __init__(
        self, ops, lengths, budgets, *, G=2, D=16, S=16, seed=0, dtype=DType.FP32, dense_layers=None
    ):
        self.ops, self.lengths, self.G, self.D, self.S = ops, lengths, G, D, S
        self.U = unit_tokens(S)
        self.Z = S // self.U
        self.paged = Paged(ops, lengths, G=G, D=D, S=S, seed=seed, dtype=dtype)
        self.tables = self.paged.tables
        self.starts = np.arange(len(lengths) + 1, dtype=np.int32)
        self.lens, self.budgets = np.int32(lengths), np.int32(budgets)
        self.dense_layers = np.int32(dense_layers or [0] * len(lengths))
        self.meta = out(ops, self.paged.num_blocks * self.Z, G, 2, D, dtype=np.uint16)
        places = [self.places(b, length // self.U) for b, length in enumerate(lengths)]
        units = np.concatenate([*places, [-1]]).astype(np.int32)
        run(ops, "block_meta_update", [self.meta, self.paged.cache], units, block_tokens=S)

    def places(self, b, count):
        """Where the first units of a request are in the cache."""
        j = np.arange(count)
        return self.tables[b, j // self.Z] * self.Z + j % self.Z

    @property
    def shape(self):
        """Of scores and selection."""
        return (len(self.lengths), self.G, self.tables.shape[1], self.Z)

    def score(self, q, layer=0):
        """Of every unit; what is not written is NaN."""
        requests = [getattr(self, name) for name in ARGUMENTS]
        meta = self.ops.memory.read(self.meta)
        return run(self.ops, "block_score", [out(self.ops, *self.shape)], q, meta, *requests,
                   layer=layer, scale=self.D**-0.5, block_tokens=self.S)[0]  # fmt: skip

    def choose(self, scores, layer=0):
        """The selection; what is not written is -1 - 2^31."""
        outs = [out(self.ops, *shape, dtype=np.int32) for shape in (self.shape, self.shape[:2])]
        requests = [getattr(self, name) for name in ARGUMENTS[2:]]
        return run(self.ops, "block_topk", outs, scores, *requests,
                   layer=layer, block_tokens=self.S)  # fmt: skip

    def attend(self, q, selection=(None, None), sinks=None, **attrs):
        """Attention of each request's row."""
        upload = [None if one is None else self.ops.memory.upload(one) for one in selection]
        more = dict(zip(("selected_BGXZ", "num_selected_BG"), upload, strict=True))
        return self.paged.attend(q, (1,) * len(self.lengths), sinks=sinks, **more, **attrs)

    def step(self, q, layer=0, **attrs):
        """All of a layer's ops."""
        return self.attend(q, self.choose(self.score(q, layer), layer), **attrs)

    def keep(self, q, selection, measured, before=None, **attrs):
        """The kept mass."""
        mass, upload = out(self.ops, len(self.lengths), 2), self.ops.memory.upload
        requests = (self.tables, self.starts, self.lens, *selection, np.int32(measured))
        arrays = [None if one is None else upload(one) for one in (*requests, before)]
        attrs |= {"num_kv_heads": self.G, "scale": self.D**-0.5}
        self.ops.kept_mass(mass, upload(q), self.paged.cache, *arrays, **attrs)
        return self.ops.memory.read(mass).copy()

    def is_sparse(self, b, layer=0):
        """By the definition."""
        num_units = -(-self.lengths[b] // self.U)
        return layer >= self.dense_layers[b] and 0 < self.budgets[b] < num_units

    def want_scores(self, q, b):
        """Of a request's full units, [G, units]."""
        count = self.lengths[b] // self.U
        meta = widened(self.ops.memory.read(self.meta))[self.places(b, count)].astype(np.float64)
        found = np.empty((self.G, count))
        for g, rows in enumerate(q[b].astype(np.float64).reshape(self.G, -1, self.D)):
            s = (rows @ meta[:, g, 0].T + abs(rows) @ meta[:, g, 1].T) * self.D**-0.5
            most = s.max(1, keepdims=True)
            found[g] = (s - most - np.log(np.exp(s - most).sum(1, keepdims=True))).max(0)
        return found

    def want_chosen(self, scores, b, g):
        """The units of a list, by sorting."""
        count = -(-self.lengths[b] // self.U)
        row = scores[b, g].ravel()
        always = [*range(SINK_UNITS), *range(count - RECENT_UNITS, count)]
        others = sorted(
            set(range(count)) - set(always),
            key=lambda j: (np.isnan(row[j]), 0 if np.isnan(row[j]) else -row[j], j),
        )
        return sorted(always + others[: self.budgets[b] - len(always)])

    def positions(self, selection):
        """Of what is selected: [b][g]."""
        selected, counts = selection
        kept = []
        for b, length in enumerate(self.lengths):
            position = np.arange(length)
            rows = [(selected[b, g].ravel(), int(counts[b, g])) for g in range(self.G)]
            kept.append([position if n < 0 else position[np.isin(position // self.U, row[:n])] for row, n in rows])  # fmt: skip
        return kept

    def forget_others(self, selection):
        """What a head did not select becomes NaN."""
        for b, kept in enumerate(self.positions(selection)):
            position = np.arange(self.lengths[b])
            k, v = self.paged.k[b].copy(), self.paged.v[b].copy()
            for g in range(self.G):
                others = np.setdiff1d(position, kept[g])
                k[others, g], v[others, g] = np.nan, np.nan
            self.paged.write(k, v, self.tables[b, position // self.S] * self.S + position % self.S)
