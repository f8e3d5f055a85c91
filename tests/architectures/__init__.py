"""The configs that architectures are tested with, a module for each, named after transformers' `model_type`.

TINY: fields that differ from `tests.tiny_models.SHAPE`; three or more, the first of which bends the cache and the blocks
most. PUBLISHED: config.json of well-known checkpoints; what says nothing of the form is left out, factors are made up.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

MODULES = {
    path.stem: import_module(f"tests.architectures.{path.stem}")
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem in CONFIG_MAPPING
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (kind, fields) for kind, module in MODULES.items() for name, fields in module.TINY.items()
}
ONE_OF_EACH = tuple(next(iter(module.TINY)) for module in MODULES.values())
PUBLISHED: dict[str, dict[str, Any]] = {
    name: config for module in MODULES.values() for name, config in module.PUBLISHED.items()
}
