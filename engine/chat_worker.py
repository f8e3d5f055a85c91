"""Runs a checkpoint's chat template in a process of its own: `python -m vivace.engine.chat_worker`. A template is a stranger's
program, so it has a limit of time, of memory and of output; the kernel ends the process at the first.

Frames on stdin and stdout: a length, then JSON. The first holds the template; each after it something to render. Ends with
its parent, whatever the template is doing: its time is limited.
"""

import json
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

from vivace.engine.chat_template import ChatTemplate
from vivace.engine.errors import ArtifactError, EngineError, FailedPrecondition, InvalidRequest

HEADER = struct.Struct("<I")
TIME_LIMIT_S = 1.0  # of this process's own time, a rendering
COMPILE_LIMIT_S = 10.0  # likewise, of the template: nobody but the operator waits for it
MEMORY_LIMIT_BYTES = 512 << 20  # over what the process has when it starts
OUTPUT_LIMIT_CHARS = 4 << 20
ERRORS = {error.code: error for error in (ArtifactError, FailedPrecondition, InvalidRequest)}


def pack(value: Any) -> bytes:
    """A frame. Surrogates, which no text has, travel as JSON escapes."""
    body = json.dumps(value).encode()
    return HEADER.pack(len(body)) + body


def main() -> None:
    """Serve until the parent closes the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle, for all its group
        signal.signal(number, signal.SIG_IGN)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template: ChatTemplate | None = None
    while (wanted := _read(sys.stdin.buffer)) is not None:
        limit_s = COMPILE_LIMIT_S if template is None else TIME_LIMIT_S
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            if template is None:
                template = ChatTemplate(wanted["source"], wanted["variables"])
                reply = {"text": ""}
            else:
                reply = {"text": _render(template, wanted)}
        except MemoryError:
            reply = {
                "code": FailedPrecondition.code,
                "message": "the chat template takes too much memory",
            }
        except EngineError as error:
            reply = {"code": error.code, "message": str(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(pack(reply))
        sys.stdout.buffer.flush()


def _render(template: ChatTemplate, wanted: dict[str, Any]) -> str:
    return template.render(
        wanted["messages"],
        opens_turn=wanted["opens_turn"],
        continues_with=wanted["continues_with"],
        variables=wanted["variables"],
        max_chars=OUTPUT_LIMIT_CHARS,
    )


def _read(file: BinaryIO) -> Any:
    """The next frame; None at the end."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (length,) = HEADER.unpack(header)
    body = file.read(length)
    return json.loads(body) if len(body) == length else None


if __name__ == "__main__":
    main()
