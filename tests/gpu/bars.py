"""What must hold on a GPU, as data: bars of our figures, and of our figures beside the peers'. Measures nothing.

A share of "copy" is the bytes that must be read over the time, as a share of the bandwidth of this run's copy; of "product",
likewise of the flop/s of its 8192^3 bf16 product. "dense" is how many times as fast as the own dense op; "us" the time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tests.gpu.results import Result
from tests.gpu.timing import Timing


@dataclass(frozen=True)
class Bar:
    """A figure passes at its bar; of a time the bar is the most, of all else the least."""

    of: str
    bar: float
    goal: float


BARS: Mapping[str, Bar] = {
    "decode/8 x 8k, 256 MB": Bar("copy", 0.85, 0.97),
    "decode/16 x 8k, 512 MB": Bar("copy", 0.90, 0.97),
    "decode/1 x 128k, 512 MB": Bar("copy", 0.90, 0.97),
    "decode/32 x 8k, 1 GB": Bar("copy", 0.90, 0.97),
    "prefill/16k": Bar("product", 0.65, 0.78),
    "sparse/32k": Bar("dense", 1.8, 1.8),
    "sparse/128k": Bar("dense", 5.0, 5.0),
    "moe/1": Bar("copy", 0.65, 0.75),
    "moe/8": Bar("copy", 0.85, 0.95),
    "moe/64": Bar("copy", 0.90, 0.97),
    "sampling/temperature": Bar("us", 15.0, 15.0),
    "sampling/top-k 50, top-p 0.9": Bar("us", 40.0, 40.0),
}


@dataclass(frozen=True)
class Beside:
    """Our figure is at least `least` times as fast as the fastest peer whose name starts so."""

    ours: str
    peers: str
    least: float


BESIDE = (
    Beside("decode/1 x 32k, 128 MB", "peers/decode/1 x 32k, 128 MB/", 1.0),
    Beside("decode/16 x 8k, 512 MB", "peers/decode/16 x 8k, 512 MB/", 1.0),
    Beside("prefill/4k", "peers/prefill/4k/flex_attention", 1.15),
    Beside("prefill/16k", "peers/prefill/16k/flex_attention", 1.15),
    *(Beside(f"moe/{m}", f"peers/moe/{m}/", 1.0) for m in (1, 8, 64, 512, 4096)),
    Beside("sampling/temperature", "peers/sampling/temperature/", 1.0),
    Beside("sampling/top-k 50, top-p 0.9", "peers/sampling/top-k 50, top-p 0.9/", 1.0),
)


def figure(name: str, timing: Timing, *, work: float | None = None, of: str = "") -> Result:
    """A time, and the bytes or operations of it over that time."""
    rate = None if work is None else work / timing.us * 1e6
    return Result(
        name, None, us=timing.us, p5_us=timing.p5_us, p95_us=timing.p95_us, rate=rate, of=of
    )


def judged(
    figure: Result,
    ceilings: Mapping[str, float],
    *,
    error: float | None,
    tolerance: float,
    dense_us: float | None = None,
) -> Result:
    """The figure with its share and whether it passes: it must be right, and reach the bar where there is one.

    `error` is None where another figure has checked the same.
    """
    bar = BARS.get(figure.name)
    of = bar.of if bar else figure.of
    assert figure.us is not None
    share = None
    if of == "us":
        share = figure.us
    elif of == "dense":
        assert dense_us is not None
        share = dense_us / figure.us
    elif of in ceilings and figure.rate is not None:
        share = figure.rate / ceilings[of]
    found = replace(figure, share=share, of=of, error=error)
    if error is not None and not error <= tolerance:
        return replace(found, passed=False, note=f"wrong: at most {tolerance:g} is allowed")
    if bar is None:
        return found
    if share is None:
        return replace(found, passed=False, note=f"this run has no {of} to be a share of")
    passed = share <= bar.bar if of == "us" else share >= bar.bar
    return replace(found, passed=passed, bar=bar.bar, goal=bar.goal)


def beside_peers(results: Sequence[Result]) -> Iterator[Result]:
    """Every comparison; one without our figure or without any peer fails."""
    times = {r.name: r for r in results if r.us is not None and r.passed is not False}
    known = {r.name: r for r in results if r.us is not None}
    for one in BESIDE:
        name = f"beside/{one.ours}"
        peers = [peer for at, peer in times.items() if at.startswith(one.peers)]
        ours = known.get(one.ours)
        if ours is None or not peers:
            missing = "our own figure" if ours is None else f"a peer {one.peers}*"
            yield Result(name, False, bar=one.least, goal=one.least, note=f"not there: {missing}")
            continue
        best = min(peers, key=lambda peer: peer.us)
        ratio = best.us / ours.us
        is_right = not ours.note.startswith("wrong")
        yield Result(
            name,
            ratio >= one.least and is_right,
            share=ratio,
            of=best.name,
            bar=one.least,
            goal=one.least,
        )
