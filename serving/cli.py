"""`vivace serve`, `generate`, `chat`. Parses words, prints text; decides nothing else."""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vivace.engine.errors import ArtifactError, ConfigError, EngineError

TARGET = "127.0.0.1:50051"
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SAMPLING = {  # flag -> (type, help)
    "max-tokens": (int, "most tokens to generate; default: up to the context"),
    "min-tokens": (int, "fewest tokens before a stop"),
    "temperature": (float, "0 takes the best token; default: the checkpoint's"),
    "top-p": (float, "keep the best tokens that have this much of the probability"),
    "top-k": (int, "keep so many of the best tokens; 0: all"),
    "min-p": (float, "drop tokens under this share of the best one's probability"),
    "seed": (int, "the same seed gives the same text"),
}


class RequestFailed(EngineError):
    """The server's refusal of a request, in its words."""

    code = "request_failed"


def main(command: str, argv: list[str]) -> int:
    """Run one of this folder's commands; returns the exit status."""
    return {"serve": _serve, "generate": _generate, "chat": _chat}[command](argv)


def _serve(argv: list[str]) -> int:
    from vivace.engine.config_file import add_flags, from_words
    from vivace.engine.runtimes.native import Child, spawn

    parser = argparse.ArgumentParser(
        prog="vivace serve",
        description="Serve checkpoints over gRPC, on one port, until told to stop.",
    )
    add_flags(parser)
    config = from_words(parser.parse_intermixed_args(argv))
    if not config.models:
        raise ConfigError("models: name at least one folder, as MODEL or under [models] of a file")
    for folder in config.models.values():
        if not folder.is_dir():
            raise ArtifactError(f"{folder} is not a folder")
    children: dict[str, Child] = {}
    try:
        for name in config.models:
            children[name] = spawn()  # it imports while this process does
        from vivace.serving import server

        server.check_address(config.server)
        engines = {name: config.engine(name) for name in config.models}
        if len(engines) > 1:  # one that is alone plans for itself
            from vivace.engine.plan import read_machine
            from vivace.engine.share import plan_all, share

            machine = read_machine()
            engines = share(engines, machine)
            plan_all(engines, machine)
    except BaseException:
        for child in children.values():
            child.discard()
        raise
    launches = {name: (engines[name], children[name]) for name in engines}
    return server.run(config.server, launches, _progress_bar())


def _generate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="vivace generate", description="Continue a text.")
    parser.add_argument("prompt")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--target", default=TARGET, help="a server (default: %(default)s)")
    where.add_argument("--model", type=Path, help="or a checkpoint, loaded in this process")
    _add_sampling(parser)
    args = parser.parse_args(argv)
    if args.model is not None:
        return _generate_here(args)
    from vivace.serving.client import Client

    with Client(args.target) as client:
        print(args.prompt, end="", flush=True)
        _print_stream(client.generate(args.prompt, **_sampling(args)))
    return 0


def _generate_here(args: argparse.Namespace) -> int:
    from vivace.engine.llm import LLM
    from vivace.engine.sampling import SamplingParams

    [result] = LLM(args.model).generate([args.prompt], SamplingParams(**_sampling(args)))
    print(args.prompt + result.outputs[0].text)
    return 0


def _chat(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vivace chat",
        description="Talk to a server. Ctrl-C ends a reply, Ctrl-D the conversation.",
    )
    parser.add_argument("--target", default=TARGET, help="a server (default: %(default)s)")
    parser.add_argument("--system", help="the system message: text, or the path of a file with it")
    _add_sampling(parser)
    args = parser.parse_args(argv)
    from vivace.serving.client import Client

    messages: list[dict[str, str]] = []
    if args.system is not None:
        messages.append({"role": "system", "content": _text_or_file(args.system)})
    status = 0
    with Client(args.target) as client:
        while (line := _ask()) is not None:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                reply = _print_stream(client.chat(asked, **_sampling(args)))
            except RequestFailed as error:  # what was said before is not lost
                print(f"vivace: error: {error}", file=sys.stderr)
                status = 1
            else:
                messages = [*asked, {"role": "assistant", "content": reply}]
                status = 0
    return status


def _ask() -> str | None:
    """The next line somebody types; None at the end."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return None


def _print_stream(stream: Any) -> str:
    """Print a reply as it comes; Ctrl-C hangs up. Returns what was shown. Raises RequestFailed."""
    import grpc

    shown = ""
    try:
        for event in stream:
            shown += event.text
            print(event.text, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
        print(" [cancelled]", end="")
    except grpc.RpcError as error:
        raise RequestFailed(f"{error.code().name}: {error.details()}") from error
    finally:
        print(flush=True)
    return shown


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    for flag, (kind, text) in SAMPLING.items():
        parser.add_argument(f"--{flag}", type=kind, help=text)
    parser.add_argument("--stop", action="append", help="end before this text; may be repeated")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names: Iterable[str] = (*(flag.replace("-", "_") for flag in SAMPLING), "stop")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _text_or_file(value: str) -> str:
    is_path = len(value) < 256 and "\n" not in value and Path(value).is_file()
    return Path(value).read_text(encoding="utf-8").strip() if is_path else value


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)(|KiB|MiB|GiB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a number with KiB, MiB or GiB, got {text!r}")
    return int(match[1]) * UNITS[match[2]]


def _progress_bar() -> Any:
    """Shows bytes of weights as they are read, where somebody looks at it."""
    is_seen = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if is_seen:
            width = 40 * done // max(total, 1)
            end = "\n" if done == total else ""
            bar = "#" * width + "." * (40 - width)
            print(
                f"\rloading [{bar}] {done / 2**20:.0f}/{total / 2**20:.0f} MiB",
                end=end,
                file=sys.stderr,
            )

    return show
