"""openvino-genai, in process: its continuous batching, or its pipeline for one prompt, with either of its attentions.

usage: python -m vivace.bench.peers.with_openvino FOLDER batching|prefix|PA|SDPA THREADS
"""

import sys
from itertools import count

import numpy as np
import openvino
import openvino_genai

from vivace.bench.peers.speak import Event, Prompts, Run, now, serve

CACHE_GB = 1


def main(folder: str, kind: str, threads: int) -> None:
    """Load, then serve."""
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    run = (
        _batching(folder, options, kind)
        if kind in ("batching", "prefix")
        else _single(folder, options, kind)
    )
    serve(run, version=f"openvino-genai {openvino_genai.__version__}")


def _batching(folder: str, options: dict[str, object], kind: str) -> Run:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = 64
    scheduler.enable_prefix_caching = kind == "prefix"
    pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", options)
    numbers = count()

    def run(prompts: Prompts, tokens: int) -> tuple[float, list[Event]]:
        start = now()
        handles = [
            pipeline.add_request(next(numbers), _tensor(ids), _generation(tokens))
            for ids in prompts
        ]
        events: list[Event] = []
        is_going = True
        while is_going:
            is_going = pipeline.has_non_finished_requests()
            if is_going:
                pipeline.step()
            when = now()
            for i, handle in enumerate(handles):
                while handle.can_read():
                    found = sum(len(one.generated_ids) for one in handle.read().values())
                    events.append((i, when, found))
        return start, events

    return run


def _single(folder: str, options: dict[str, object], attention: str) -> Run:
    pipeline = openvino_genai.LLMPipeline(folder, "CPU", **options, ATTENTION_BACKEND=attention)

    def run(prompts: Prompts, tokens: int) -> tuple[float, list[Event]]:
        [ids] = prompts
        start = now()
        metrics = pipeline.generate(_tensor(ids), _generation(tokens)).perf_metrics
        first = start + metrics.get_ttft().mean / 1e3
        if tokens == 1:
            return start, [(0, first, 1)]
        last = first + metrics.get_tpot().mean / 1e3 * (tokens - 1)
        return start, [(0, first, 1), (0, last, tokens - 1)]

    return run


def _generation(tokens: int) -> openvino_genai.GenerationConfig:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


def _tensor(ids: object) -> openvino.Tensor:
    return openvino.Tensor(np.array([ids], np.int64))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
