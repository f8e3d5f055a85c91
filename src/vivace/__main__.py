"""The `vivace` command: joins the commands that each folder declares in its `cli.py`, imported when named."""

import os
import sys
from importlib import import_module

from vivace import __version__
from vivace.engine.errors import EngineError

COMMANDS = {  # command -> (module, what it does)
    "serve": ("vivace.serving.cli", "serve a checkpoint over gRPC"),
    "chat": ("vivace.serving.cli", "talk to a server"),
    "generate": ("vivace.serving.cli", "continue texts, by a server or one of its own"),
    "info": ("vivace.engine.cli", "say what a checkpoint is and what it takes to serve it"),
    "config": (
        "vivace.engine.cli",
        "print all settings, and what this machine makes of a checkpoint",
    ),
    "kernels": ("vivace.engine.cli", "compile GPU kernels ahead of time, list and check them"),
    "bench": ("vivace.bench.cli", "measure"),
}
USAGE = "usage: vivace COMMAND ...   (vivace COMMAND --help says more)\n\n" + "".join(
    f"  {name:10s}{text}\n" for name, (_, text) in COMMANDS.items()
)


def main() -> int:
    """Run the command that `sys.argv` names; returns the exit status. Errors a caller can mend are one line."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"vivace {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"vivace: error: no command {words[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        status: int = import_module(COMMANDS[words[0]][0]).main(words[0], words[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more, as behind `| head`: what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a process that SIGPIPE ends
    except (EngineError, OSError) as error:
        print(f"vivace: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
