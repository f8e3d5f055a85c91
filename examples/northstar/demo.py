"""Starts a server on the model beside this file and plays a customer's conversation through the Python client.

    make demo

The replies must be those that `conversation/record_replies.py` recorded from transformers, token for token.
"""

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from conversation import script

from vivace.serving.client import Client

STOP_S = 30


def start_server() -> tuple["subprocess.Popen[str]", str]:
    """The server process and where it listens: it says so in one line once the model is loaded."""
    command = [
        str(Path(sys.executable).parent / "vivace"),
        "serve",
        str(script.MODEL),
        "--port",
        "0",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise SystemExit(f"the server did not start: {server.communicate()[1]}")
    return server, line.split()[-1]


def play(client: Client) -> tuple[list[list[int]], list[float], list[list[float]]]:
    """All turns. Returns the tokens, when each turn was asked, and when each of its pieces came."""
    messages = [{"role": "system", "content": script.system_message()}]
    replies, asked, came = [], [], []
    for turn in script.conversation()["turns"]:
        print(f"\n[{turn['about']}]\ncustomer: {turn['user']}\n   shop: ", end="", flush=True)
        messages.append({"role": "user", "content": turn["user"]})
        text, token_ids, times = "", [], []
        asked.append(time.monotonic())
        for event in client.chat(messages, temperature=0):
            print(event.text, end="", flush=True)
            text += event.text
            token_ids += event.token_ids
            times += [time.monotonic()] * len(event.token_ids)
        print()
        messages.append({"role": "assistant", "content": text})
        replies.append(token_ids)
        came.append(times)
    return replies, asked, came


def main() -> int:
    """Play, measure, compare."""
    started = time.monotonic()
    server, target = start_server()
    try:
        with Client(target) as client:
            replies, asked, came = play(client)
    finally:
        server.terminate()
        server.communicate(timeout=STOP_S)
    ttfts = [times[0] - at for at, times in zip(asked, came, strict=True)]
    gaps = [b - a for times in came for a, b in pairwise(times)]
    tokens = sum(map(len, replies))
    seconds = sum(times[-1] - at for at, times in zip(asked, came, strict=True))
    print(f"\nserver start to first token  {came[0][0] - started:8.2f} s")
    print(f"TTFT, first turn             {ttfts[0] * 1e3:8.1f} ms")
    print(
        f"TTFT, later turns, median    {median(ttfts[1:]) * 1e3:8.1f} ms   (their prefix is cached)"
    )
    print(f"ITL, median                  {median(gaps) * 1e3:8.1f} ms")
    print(f"tokens/s, one stream         {tokens / seconds:8.1f}     (prefill included)")
    if replies != [reply["token_ids"] for reply in script.recorded_replies()]:
        print("the replies are NOT those of transformers")
        return 1
    print(f"all {tokens} tokens equal Hugging Face transformers' greedy replies")
    return 0


if __name__ == "__main__":
    sys.exit(main())
