"""`vivace kernels`: the variants that serving needs, found by a dry run of the model, then compiled, listed or judged.

Needs no weights and no GPU. What is run is the program and the sampler that serve, at the sizes of `warm_up`.
"""

import tempfile
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vivace.engine.config import CacheConfig, Config, SchedulerConfig
from vivace.engine.errors import ConfigError
from vivace.engine.models.decoder import emit
from vivace.engine.models.fuse import fuse
from vivace.engine.models.hf_config import spec_of
from vivace.engine.models.json_fields import Fields, read_fields
from vivace.engine.models.spec import ModelSpec
from vivace.engine.models.weights import in_bf16
from vivace.engine.plan import block_tokens_of
from vivace.engine.warm_up import Bound, bind_dry, one_of_each, warm_up
from vivace.kernels.backend import Backend, Ops, bind_triton
from vivace.kernels.buffer import DType
from vivace.kernels.compilation import Variant
from vivace.kernels.gpu import ahead

SHIPPED = Path(__file__).with_name("models") / "shipped.toml"
LARGE_STEPS = SchedulerConfig(max_step_tokens=8192, max_running=256)  # as large as anybody's
Judgement = dict[Variant, list[str]]
KV_BYTES = 1 << 40  # of the dry run's cache, which has no memory


@dataclass(frozen=True, slots=True)
class Model:
    """What a dry run needs of one."""

    config: Config
    spec: ModelSpec
    is_bf16: bool
    kv_dtype: DType

    def bind(self, ops: Ops) -> Bound:
        """Ready to run on ops without memory, or such that make up the weights."""
        spec = one_of_each(self.spec)
        program = emit(spec, self.kv_dtype, block_tokens_of(self.config))
        if self.is_bf16:
            program = in_bf16(program, lambda value: True)
        return bind_dry(self.config, spec, fuse(program), ops)

    def run(self, ops: Ops) -> None:
        """Meet every kernel that serving it can."""
        warm_up(self.bind(ops))


def shipped() -> dict[str, dict[str, Any]]:
    """The fields of config.json of each model whose kernels ship, by its name."""
    return tomllib.loads(SHIPPED.read_text(encoding="utf-8"))


def read_models(name: str | None, cache: CacheConfig) -> list[Model]:
    """A folder's, one that ships, or with None all that do. Raises ConfigError or ArtifactError."""
    tables = shipped()
    if name is None:
        return [_model(Fields(str(SHIPPED), table), cache) for table in tables.values()]
    if Path(name).is_dir():
        return [_model(read_fields(Path(name) / "config.json"), cache)]
    if name not in tables:
        raise ConfigError(f"{name} is neither a folder nor one of {', '.join(tables)}")
    return [_model(Fields(str(SHIPPED), tables[name]), cache)]


def listed(models: list[Model], target: str) -> list[Variant]:
    """The variants of these models on a target, each once; nothing is compiled."""
    with ahead.listing(target) as launcher:
        ops = bind_triton(launcher)
        for model in models:
            model.run(ops)
    return launcher.watch.variants


def compiled(
    models: list[Model], target: str, cache_dir: Path, device: str | None = None
) -> tuple[Judgement, int]:
    """What is wrong with each variant, and how many were compiled, not found in the folder."""
    with ahead.compiling(target, cache_dir, device) as launcher:
        ops = bind_triton(launcher)
        for model in models:
            model.run(ops)
        return ahead.judge(launcher.watch, target), launcher.watch.num_compiled


def show(models: list[Model], targets: list[str]) -> int:
    """Print every variant and its targets; returns the exit status."""
    found: dict[str, list[str]] = {}
    for target in targets:
        for line in map(str, listed(models, target)):
            found.setdefault(line, []).append(target)
    for line, names in sorted(found.items()):
        print(f"{line} on {', '.join(names)}")
    for target in targets:
        print(f"{target}: {sum(target in names for names in found.values())} variants")
    return 0


def build(models: list[Model], target: str, cache_dir: Path, device: str | None) -> int:
    """Compile into a folder; returns the exit status."""
    judgement, num_compiled = compiled(models, target, cache_dir, device)
    num_found = len(judgement) - num_compiled
    print(f"{target}: compiled {num_compiled} variants, found {num_found}, in {cache_dir}")
    return 0


def check(models: list[Model], target: str) -> int:
    """Compile, print what is wrong with the machine code; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        judgement, _ = compiled(models, target, Path(folder))
    for variant, problems in judgement.items():
        if problems:
            print(f"{variant}: {'; '.join(problems)}")
    num_wrong = sum(map(bool, judgement.values()))
    print(f"{target}: {len(judgement)} variants, {num_wrong} not as they must be")
    return int(num_wrong > 0)


def _model(fields: Fields, cache: CacheConfig) -> Model:
    dtype = fields.raw("torch_dtype") or fields.raw("dtype")
    config = Config(
        model=Path(fields.file).parent,
        backend=Backend.TRITON,
        scheduler=LARGE_STEPS,
        cache=replace(cache, memory_bytes=KV_BYTES),
    )
    is_bf16 = dtype == "bfloat16"
    as_served = DType.BF16 if is_bf16 else DType.FP32
    kv_dtype = as_served if cache.dtype is None else DType(cache.dtype.value)
    return Model(config, spec_of(fields), is_bf16, kv_dtype)
