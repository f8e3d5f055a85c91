"""Vivace: a low-latency inference engine for large language models.

`LLM` and `SamplingParams` are imported when they are first named, so that the client alone stays light.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "vivace.engine.llm", "SamplingParams": "vivace.engine.sampling"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vivace' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
