"""A `vivace serve` process, as a user would start it."""

import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

MODEL = Path(__file__).parents[2] / "examples" / "northstar"
CHAT = [{"role": "user", "content": "How many days does delivery take?"}]
PROMPT = "<|im_start|>user\nHow many days does delivery take?<|im_end|>\n<|im_start|>assistant\n"


class Server:
    """A `vivace serve` process and what it printed."""

    def __init__(self, *arguments, model=MODEL, names=None):
        self._names = names or Path(model).name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vivace", "serve", str(model), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        self.errors += iter(self.process.stderr.readline, "")

    def wait_ready(self):
        line = self.process.stdout.readline()
        assert line.startswith(f"vivace: serving {self._names} on "), (line, self.errors)
        self.target = line.split()[-1]
        return self

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)
        self.process.stdout.close()
        self.process.stderr.close()

    def wait(self, seconds):
        """Exit status, and everything it said on stderr."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code, "".join(self.errors)

    def engine_pid(self):
        """The one child that runs the engine."""
        [pid] = engine_pids(self.process.pid)
        return pid


def engine_pids(server_pid):
    """The children of a process that run engines."""
    children = Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split()
    for task in Path(f"/proc/{server_pid}/task").iterdir():
        children += (task / "children").read_text().split()
    return {int(child) for child in children if b"vivace.engine.process" in _command(child)}


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def is_gone(pid, seconds):
    """Whether a process ends within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not _command(pid):
            return True
        time.sleep(0.02)
    return False


@contextmanager
def serving(*arguments, model=MODEL, names=None):
    server = Server("--port", "0", *arguments, model=model, names=names)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "still not so"
        time.sleep(0.02)
