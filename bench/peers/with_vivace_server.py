"""Vivace over gRPC, each prompt a stream of its own, from a client that costs next to nothing (`bench/http2.py`).

usage: python -m vivace.bench.peers.with_vivace_server MODEL QUANTIZE CACHE_DIR THREADS [KV_DTYPE]
"""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing

from vivace.bench.http2 import Connection, timed_messages
from vivace.bench.peers.speak import Event, Prompts, now, serve
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

METHOD = f"/{pb.DESCRIPTOR.services_by_name['Inference'].full_name}/Generate"
STOP_S = 30
TIMEOUT_S = 120.0  # for anything to come


def main(model: str, quantize: str, cache_dir: str, threads: str, kv_dtype: str = "fp32") -> None:
    """Start the server, wait until it is ready, serve until there are no more jobs."""
    settings = {
        "weights.quantize": quantize,
        "weights.cache_dir": cache_dir,
        "cpu.threads": threads,
        "cache.dtype": kv_dtype,
    }
    words = [sys.executable, "-P", "-m", "vivace", "serve", model, "--port", "0"]
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            target = server.stdout.readline().split()[-1]  # printed once the model is loaded
            host, _, port = target.rpartition(":")
            with closing(Connection(host, int(port), timeout_s=TIMEOUT_S)) as connection:

                def run(prompts: Prompts, tokens: int) -> tuple[float, list[Event]]:
                    requests = [_request(ids, tokens) for ids in prompts]
                    start = now()
                    bodies = connection.pieces(METHOD, requests)
                    return start, [
                        (number, when, len(pb.GenerateResponse.FromString(message).token_ids))
                        for number, pieces in enumerate(bodies)
                        for when, message in timed_messages(pieces)
                    ]

                serve(run, version="vivace over gRPC", process=server.pid)
        finally:
            server.terminate()
            server.wait(STOP_S)


def _request(ids: Sequence[int], tokens: int) -> bytes:
    sampling = pb.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompt = pb.TokenIds(ids=ids)
    return pb.GenerateRequest(token_ids=prompt, sampling=sampling).SerializeToString()


if __name__ == "__main__":
    main(*sys.argv[1:6])
