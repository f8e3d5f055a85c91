"""`vivace serve`, `generate`, `chat`. Parses words, prints text; decides nothing else."""

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from vivace.engine.errors import ArtifactError, ConfigError, EngineError, InvalidRequest

TARGET = "127.0.0.1:50051"
INTERRUPT_CHECK_S = 0.02  # as long as a reply may go on after Ctrl-C
# What a chat, which shows the text of one reply, has no use for.
NO_CHAT = ("n", "best_of", "echo", "logprobs", "prompt_logprobs", "prompt_logprobs_start")


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

            machine = read_machine(config.device)
            engines = share(engines, machine)
            plan_all(engines, machine)
    except BaseException:
        for child in children.values():
            child.discard()
        raise
    launches = {name: (engines[name], children[name]) for name in engines}
    return server.run(config.server, launches, _progress_bar())


def _generate(argv: list[str]) -> int:
    from vivace.serving import sampling_flags

    parser = argparse.ArgumentParser(
        prog="vivace generate",
        description="Continue a text, or each line of a file.",
        epilog="A line of FILE is a prompt; one that begins with { is JSON with prompt or messages, and parameters by "
        "the API's names, which go before the flags. What comes of it is a line of JSON.",
    )
    parser.add_argument("prompt", nargs="?", help="a text to continue")
    parser.add_argument("--input", metavar="FILE", help="or a file of prompts; - is stdin")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write JSON lines there; - is stdout (default with --input)",
    )
    parser.add_argument(
        "--concurrency", type=int, default=16, help="lines asked at a time (default: %(default)s)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--target", default=TARGET, help="a server (default: %(default)s)")
    where.add_argument("--model", type=Path, help="or a checkpoint, loaded for this command alone")
    parser.add_argument("--quantize", help="round that checkpoint's weights: int8 or int4")
    _add_name(parser)
    sampling_flags.add_flags(parser)
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.input is None):
        parser.error("one of PROMPT and --input must be given")
    if args.quantize is not None and args.model is None:
        parser.error("--quantize is of a --model that is loaded for this command")
    if args.concurrency < 1:
        parser.error(f"--concurrency must be at least 1, got {args.concurrency}")
    params = sampling_flags.from_flags(args) | _named(args)
    _check_texts({"prompt": args.prompt, **params})
    from vivace.serving.client import Client

    with ExitStack() as stack:
        target = args.target
        if args.model is not None:
            if not args.model.is_dir():
                raise ArtifactError(f"{args.model} is not a folder")
            from vivace.engine.config import Config, quantized_by
            from vivace.serving import private

            engine = Config(model=args.model, weights=quantized_by(args.quantize))
            target = stack.enter_context(private.serving(engine, _progress_bar()))
        client = stack.enter_context(Client(target))
        if args.input is None and args.output is None:
            return _continue(client, args.prompt, params)
        return _generate_lines(client, args, params)


def _continue(client: Any, prompt: str, params: dict[str, Any]) -> int:
    """Show one prompt and its reply as it comes; further ones of `n` once all have ended."""
    others: dict[int, str] = {}

    def of_first() -> Iterator[str]:
        for event in client.generate(prompt, **params):
            if event.index:
                others[event.index] = others.get(event.index, "") + event.text
            else:
                yield event.text

    head = "" if params.get("echo") else prompt
    print(head, end="", flush=True)
    try:
        with _refusals():
            _show(of_first(), [])
    finally:
        print(flush=True)
    for _, text in sorted(others.items()):
        print(f"\n{head}{text}")
    return 0


def _generate_lines(client: Any, args: argparse.Namespace, params: dict[str, Any]) -> int:
    from vivace.serving import prompt_lines

    with ExitStack() as stack:
        out: TextIO = sys.stdout
        if args.output not in (None, "-"):
            out = stack.enter_context(Path(args.output).open("w", encoding="utf-8"))
        elif isinstance(out, TextIOWrapper):
            out.reconfigure(encoding="utf-8")  # as JSON is, whatever the locale
        if args.input is None:
            items = iter([prompt_lines.Item(0, {"prompt": args.prompt}, params)])
        elif args.input == "-":
            items = prompt_lines.read_items(sys.stdin.buffer, params)
        else:
            lines = stack.enter_context(Path(args.input).open("rb"))
            items = prompt_lines.read_items(lines, params)
        return int(prompt_lines.run(client, items, out, concurrency=args.concurrency) > 0)


def _chat(argv: list[str]) -> int:
    from vivace.serving import sampling_flags

    parser = argparse.ArgumentParser(
        prog="vivace chat",
        description="Talk to a server. Ctrl-C ends a reply, of which the model remembers what was shown; "
        "Ctrl-D ends the conversation.",
    )
    parser.add_argument("--target", default=TARGET, help="a server (default: %(default)s)")
    _add_name(parser)
    parser.add_argument("--system", help="the system message: text, or the path of a file with it")
    sampling_flags.add_flags(parser, without=NO_CHAT)
    args = parser.parse_args(argv)
    params = sampling_flags.from_flags(args) | _named(args)
    _check_texts({"system": args.system, **params})
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a bad byte spoils its line, and no other
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` a history
    from vivace.serving.client import Client

    messages: list[dict[str, str]] = []
    if args.system is not None:
        messages.append({"role": "system", "content": _text_or_file(args.system)})
    status = 0
    with Client(args.target) as client:
        while (line := _ask()) is not None:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                _check_texts({"the message": line})
                reply = _reply(client, asked, params)
            except (InvalidRequest, RequestFailed) as error:  # what was said before is not lost
                print(f"vivace: error: {error}", file=sys.stderr)
                status = 1
                continue
            status = 0
            if reply:  # a turn that was cancelled before its first word was not said
                messages = [*asked, {"role": "assistant", "content": reply}]
    return status


def _ask() -> str | None:
    """The next line somebody types; None at the end."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _reply(client: Any, messages: list[dict[str, str]], params: dict[str, Any]) -> str:
    """Show a reply as it comes; Ctrl-C hangs up. Returns what was shown. Raises RequestFailed."""
    shown: list[str] = []
    with _refusals():
        stream = client.chat(messages, **params)
        try:
            with _on_interrupt(stream.close) as interrupted:
                _show((event.text for event in stream), shown)
            if interrupted.is_set():
                print(" [cancelled]", end="")
        finally:
            print(flush=True)
    return "".join(shown)


@contextmanager
def _on_interrupt(act: Callable[[], None]) -> Iterator[threading.Event]:
    """Ctrl-C runs `act` in a thread of its own and raises nothing: an exception in the midst of a lock of gRPC's would leave it
    as it was. The event says whether there was one."""
    interrupted, is_over = threading.Event(), threading.Event()

    def watch() -> None:
        while not is_over.wait(INTERRUPT_CHECK_S):
            if interrupted.is_set():
                act()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        is_over.set()
        watcher.join()
        signal.signal(signal.SIGINT, before)


def _show(texts: Iterable[str], shown: list[str]) -> None:
    for text in texts:
        shown.append(text)
        print(text, end="", flush=True)


@contextmanager
def _refusals() -> Iterator[None]:
    """Raise RequestFailed for what the server, or the way to it, refuses."""
    import grpc

    try:
        yield
    except grpc.RpcError as error:
        raise RequestFailed(f"{error.code().name}: {error.details()}") from error
    except (
        TypeError,
        ValueError,
    ) as error:  # what protobuf has no room for: bytes that are no text
        raise RequestFailed(f"INVALID_ARGUMENT: {error}") from error


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="which of the server's models, where it serves several")


def _named(args: argparse.Namespace) -> dict[str, str]:
    return {} if args.name is None else {"model": args.name}


def _text_or_file(value: str) -> str:
    is_path = len(value) < 256 and "\n" not in value and Path(value).is_file()
    if not is_path:
        return value
    try:
        return Path(value).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{value} is not UTF-8: {error.reason}, byte {error.start}") from error


def _check_texts(values: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for a text of bytes that are no UTF-8: Python has them as halves of surrogate pairs."""
    for name, value in values.items():
        for text in value if isinstance(value, list) else (value,):
            try:
                str(text).encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"{name} must be UTF-8, got {text!r:.80}") from error


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
