"""onnxruntime-genai, in process. It has no continuous batching: prompts of one job must be equally long.

usage: python -m vivace.bench.peers.with_onnxruntime FOLDER      threads: what the folder's genai_config.json says
"""

import sys

import numpy as np
import onnxruntime_genai

from vivace.bench.peers.speak import Event, Prompts, now, serve


def main(folder: str) -> None:
    """Load, then serve."""
    model = onnxruntime_genai.Model(folder)

    def run(prompts: Prompts, tokens: int) -> tuple[float, list[Event]]:
        start = now()
        length = len(prompts[0]) + tokens
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=len(prompts)
        )
        generator = onnxruntime_genai.Generator(model, params)
        ids = np.array(prompts, np.int32)
        generator.append_tokens(ids if len(prompts) > 1 else ids[0])
        events: list[Event] = []
        for _ in range(tokens):
            generator.generate_next_token()
            generator.get_next_tokens()
            when = now()
            events += ((i, when, 1) for i in range(len(prompts)))
        return start, events

    serve(run, version=f"onnxruntime-genai {onnxruntime_genai.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
