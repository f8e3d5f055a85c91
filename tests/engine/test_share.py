"""Several engines on one machine: what each may take."""

from dataclasses import replace

import pytest

from tests.tiny_models import make_checkpoint
from vivace.engine.config import CacheConfig, Config, CpuConfig
from vivace.engine.errors import ArtifactError, ConfigError
from vivace.engine.plan import Machine
from vivace.engine.share import plan_all, share

MACHINE = Machine(num_cpus=7, free_bytes=3 << 30)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def several(model, **settings):
    return {name: Config(model=model, **settings) for name in ("a", "b", "c")}


def test_an_engine_that_is_alone_keeps_its_settings(model):
    alone = {"a": Config(model=model)}
    assert share(alone, MACHINE) == alone


def test_engines_side_by_side_take_no_more_together_than_one_alone_would(model):
    plans = plan_all(share(several(model), MACHINE), MACHINE)
    assert [plan.threads for plan in plans.values()] == [2, 2, 2]
    alone = plan_all({"a": Config(model=model)}, MACHINE)["a"]
    total = sum(plan.kv_bytes for plan in plans.values())
    assert 0.99 * alone.kv_bytes < total <= alone.kv_bytes


def test_on_a_gpu_each_cache_is_its_part_of_half_the_memory(model):
    gpu = Machine(num_cpus=2, free_bytes=60 << 30, is_gpu=True)
    shared = share(several(model, device="cuda"), gpu)
    assert [config.cache.memory_bytes for config in shared.values()] == [10 << 30] * 3
    assert [config.cpu for config in shared.values()] == [CpuConfig()] * 3


def test_an_engine_has_a_thread_where_there_are_fewer_cpus_than_engines(model):
    shared = share(several(model), replace(MACHINE, num_cpus=2))
    assert [config.cpu.threads for config in shared.values()] == [1, 1, 1]


def test_what_is_set_holds_for_each_engine(model):
    configs = several(
        model, cache=CacheConfig(memory_bytes=1 << 20), cpu=CpuConfig(threads=5, isa="portable")
    )
    assert share(configs, MACHINE) == configs


def test_engines_that_fit_alone_and_not_together_are_refused(model):
    configs = share(several(model, cache=CacheConfig(memory_bytes=50 << 20)), MACHINE)
    small = Machine(2, 130 << 20)
    for name, config in configs.items():
        plan_all({name: config}, small)
    text = r"not enough memory: .* of all models \(a \d+ MiB, b \d+ MiB, c \d+ MiB\) need"
    with pytest.raises(ConfigError, match=text):
        plan_all(configs, small)


def test_the_model_that_cannot_run_is_named(model, tmp_path):
    configs = several(model)
    with pytest.raises(ConfigError, match="model 'b': max_context_tokens must be in"):
        plan_all(configs | {"b": Config(model=model, max_context_tokens=1 << 20)}, MACHINE)
    with pytest.raises(ArtifactError, match=r"model 'c': .*config"):
        plan_all(configs | {"c": Config(model=tmp_path)}, MACHINE)
