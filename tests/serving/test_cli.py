"""The commands as people use them: what they print, how they end."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from vivace.serving import cli

VIVACE = (sys.executable, "-P", "-m", "vivace")


def run(*words, **options):
    return subprocess.run(
        [*VIVACE, *words], capture_output=True, text=True, timeout=60, check=False, **options
    )


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
def test_help_names_every_flag_and_what_it_does(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(command, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(f"usage: vivace {command}")
    flags = text[text.index("options:") :].split("\n  -")[1:]
    assert len(flags) > 8
    for flag in flags:
        words = re.sub(r"\{.*?\}|-[-\w]+|\b[A-Z_]+\b", "", flag).split()
        assert len(words) >= 3, flag


def test_generate_prints_the_prompt_and_what_follows_it(server, client):
    prompt = "Once upon"
    want = "".join(event.text for event in client.generate(prompt, temperature=0, max_tokens=12))
    words = ("generate", prompt, "--temperature", "0", "--max-tokens", "12")
    done = run(*words, "--target", server.target)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{prompt}{want}\n", "")


def test_a_refusal_is_one_line_with_the_servers_words(server):
    done = run("generate", "x", "--temperature", "9", "--target", server.target)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("vivace: error: INVALID_ARGUMENT: temperature")


def test_no_server_is_one_line():
    done = run("generate", "x", "--target", "127.0.0.1:1")
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1 and "UNAVAILABLE" in done.stderr


def test_a_refused_message_does_not_end_the_chat(server):
    done = run("chat", "--temperature", "9", "--target", server.target, input="one\ntwo\n")
    assert done.returncode == 1
    assert done.stderr.count("vivace: error: INVALID_ARGUMENT: temperature") == 2


def test_a_chat_remembers_what_was_said(server, client):
    first = {"role": "user", "content": "How long does delivery take?"}
    second = {"role": "user", "content": "And a refund?"}

    def reply(messages):
        return "".join(e.text for e in client.chat(messages, temperature=0, max_tokens=40))

    system = {"role": "system", "content": "Be brief."}
    one = reply([system, first])
    two = reply([system, first, {"role": "assistant", "content": one}, second])
    words = ("chat", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "40")
    lines = f"{first['content']}\n{second['content']}\n"
    done = run(*words, "--target", server.target, input=lines)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"> {one}\n> {two}\n> \n"


def test_ctrl_c_ends_a_reply_and_ctrl_d_the_chat(server):
    """On a terminal of its own."""
    terminal, inside = pty.openpty()
    words = (*VIVACE, "chat", "--min-tokens", "1900", "--target", server.target)
    # Where the tests run in the background of a shell they ignore SIGINT, and their children would too.
    with_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    chat = subprocess.Popen(
        words, stdin=inside, stdout=inside, stderr=inside, preexec_fn=with_sigint
    )
    os.close(inside)
    try:
        read_until(terminal, "> ")
        os.write(terminal, b"Hello\n")
        read_until(terminal, "Hello")
        time.sleep(0.5)  # into the reply
        chat.send_signal(signal.SIGINT)
        shown = read_until(terminal, "[cancelled]")
        if "> " not in shown.split("[cancelled]")[1]:
            read_until(terminal, "> ")
        os.write(terminal, b"\x04")
        assert chat.wait(10) == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(terminal)


def read_until(terminal, words):
    """What a program on a terminal shows up to these words."""
    shown = ""
    while words not in shown:
        shown += os.read(terminal, 4096).decode(errors="replace")
    return shown
