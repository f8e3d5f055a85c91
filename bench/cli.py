"""`vivace bench host|startup`."""

import argparse
from pathlib import Path

from vivace.bench import host, result, startup


def main(command: str, argv: list[str]) -> int:
    """Run one of this folder's commands; returns the exit status."""
    assert command == "bench"
    parser = argparse.ArgumentParser(prog="vivace bench", description="Measure.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    host_parser = kinds.add_parser("host", help="the host's share of a decode step, by ratio")
    host_parser.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    host_parser.add_argument("--rounds", type=int, default=20)
    startup_parser = kinds.add_parser("startup", help="server start to first token, over gRPC")
    startup_parser.add_argument("model", type=Path, help="a checkpoint with a chat template")
    startup_parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(argv)
    if args.kind == "host":
        figures = [one for count in args.requests for one in host.measure(count, args.rounds)]
        result.report("bench host", figures, {"rounds": args.rounds})
    else:
        figures = startup.measure(args.model, args.runs)
        result.report("bench startup", figures, {"model": args.model.name, "runs": args.runs})
    return 0
