"""`vivace bench host|startup|frontend|process|quality|cpu|sparse|peers`."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import vivace
from vivace.bench import cpu, frontend, host, process, quality, result, sparse, startup
from vivace.bench.peers import rows
from vivace.bench.peers.engines import Setting
from vivace.bench.result import Figure
from vivace.engine.config import Config, CpuConfig, quantized_by
from vivace.engine.errors import ConfigError
from vivace.engine.models.quantize import Quantize
from vivace.engine.plan import read_machine

PACKAGE = Path(vivace.__file__).parent
DEMO = Path(__file__).resolve().parents[1] / "examples" / "northstar"


def main(command: str, argv: list[str]) -> int:
    """Run one of this folder's commands; returns the exit status."""
    assert command == "bench"
    args = _parser().parse_args(argv)
    figures: Sequence[Figure]
    config: Mapping[str, str | int]
    match args.kind:
        case "host":
            figures = [one for count in args.requests for one in host.measure(count, args.rounds)]
            config = {"rounds": args.rounds}
        case "startup":
            figures = startup.measure(args.model, args.runs, args.quantize)
            config = {"model": args.model.name, "runs": args.runs, "quantize": args.quantize}
        case "frontend":
            load = frontend.Load(args.rounds, args.streams, args.messages, args.calls)
            figures = frontend.measure(args.model, load)
            config = {"model": args.model.name, **asdict(load)}
        case "process":
            decode = process.Load(
                args.rounds, args.streams, args.tokens, args.threads, args.quantize
            )
            figures = process.measure(args.model, decode)
            config = {"model": args.model.name, **asdict(decode)}
        case "quality":
            figures = quality.measure(args.model, quality.read_rows(args.rows, args.rows_kind))
            config = {
                "model": args.model.name,
                "rows": args.rows.name,
                "kind": args.rows_kind or "all",
            }
        case "cpu":
            settings = CpuConfig(threads=args.threads, isa=args.isa)
            weights = quantized_by(args.quantize)
            engine = Config(model=args.model, cpu=settings, weights=weights)
            figures = cpu.measure(engine, cpu.Load(rounds=args.rounds))
            config = {"model": args.model.name, "threads": args.threads, "rounds": args.rounds}
            config |= {"quantize": args.quantize, "isa": args.isa or "best"}
        case "sparse":
            size = sparse.Load(args.rounds, args.context, args.budget, args.layers)
            figures = sparse.measure(args.threads, size)
            config = {"threads": args.threads, **asdict(size)}
        case "peers":
            figures = _peers(args)
            config = {"model": args.model.name, "threads": args.threads, "rounds": args.rounds}
    result.report(f"bench {args.kind}", figures, config)
    return 0


def _peers(args: argparse.Namespace) -> list[Figure]:
    """Other environments see this package through a folder that holds nothing else."""
    model, peers = args.model.resolve(), args.peers.resolve()
    if not peers.is_dir():
        raise ConfigError(f"--peers must be a folder that bench/peers/prepare.py made, got {peers}")
    cache = peers / "vivace-cache"
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as source:
        Path(source, "vivace").symlink_to(PACKAGE)
        at = Setting(model, peers, cache, Path(source), args.threads)
        return rows.measure(at, rounds=args.rounds, rows=args.rows, without=args.without)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vivace bench", description="Measure.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("host", help="the host's share of a decode step, by ratio")
    one.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    one.add_argument("--rounds", type=int, default=20)
    one = kinds.add_parser("startup", help="server start to first token, over gRPC")
    one.add_argument("model", type=Path, help="a checkpoint with a chat template")
    one.add_argument("--runs", type=int, default=5)
    one.add_argument("--quantize", default="none")
    one = kinds.add_parser("frontend", help="what the service costs beside its engine, by ratio")
    one.add_argument("model", type=Path, nargs="?", default=DEMO, help="whose tokenizer is used")
    one.add_argument("--rounds", type=int, default=20)
    one.add_argument("--streams", type=int, default=32)
    one.add_argument("--messages", type=int, default=200, help="of each stream")
    one.add_argument("--calls", type=int, default=50, help="of one token, one after another")
    one = kinds.add_parser("process", help="what the engine's own process costs, by ratio")
    one.add_argument("model", type=Path)
    one.add_argument("--rounds", type=int, default=8)
    one.add_argument("--streams", type=int, default=8)
    one.add_argument("--tokens", type=int, default=96, help="of each stream")
    one.add_argument("--threads", type=int, default=read_machine().num_cpus)
    one.add_argument("--quantize", default="none")
    one = kinds.add_parser("quality", help="what quantizing costs in perplexity")
    one.add_argument("model", type=Path)
    one.add_argument("rows", type=Path, help="lines of JSON with prompt_ids and greedy_ids")
    one.add_argument("--rows-kind", metavar="KIND", help="only lines whose kind is this")
    _add_cpu(kinds)
    one = kinds.add_parser("peers", help="beside other engines on the same machine, by ratio")
    one.add_argument("model", type=Path)
    one.add_argument("--peers", type=Path, required=True, help="what bench/peers/prepare.py made")
    one.add_argument("--rows", nargs="+", choices=rows.ROWS, default=list(rows.ROWS))
    one.add_argument("--without", nargs="+", default=[], help="engines by how their name begins")
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--threads", type=int, default=read_machine().num_cpus)
    return parser


def _add_cpu(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What is measured beside the machine's bandwidth."""
    one = kinds.add_parser("cpu", help="ops and model as shares of bandwidth and peaks")
    one.add_argument("model", type=Path)
    one.add_argument("--quantize", choices=[one.value for one in Quantize], default="none")
    one.add_argument("--isa", help="instruction set (default: the best there is)")
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--threads", type=int, default=read_machine().num_cpus)
    one = kinds.add_parser("sparse", help="block-sparse decode beside dense attention; no model")
    one.add_argument("--rounds", type=int, default=20)
    one.add_argument("--context", type=int, default=32_768, help="tokens in the cache")
    one.add_argument("--budget", type=int, default=2_048, help="tokens that are attended to")
    one.add_argument("--layers", type=int, default=6, help="whose caches take turns")
    one.add_argument("--threads", type=int, default=read_machine().num_cpus)
