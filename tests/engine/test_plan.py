"""What follows from a model and a machine, and what is refused."""

import pytest

from vivace.engine.config import CacheConfig, Config, CpuConfig, SchedulerConfig, SparseConfig
from vivace.engine.errors import ConfigError
from vivace.engine.models.decoder import emit
from vivace.engine.models.spec import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    QkNorm,
    RopeSpec,
)
from vivace.engine.plan import (
    Machine,
    kv_token_bytes,
    make_plan,
    meta_bytes,
    num_parameters,
    read_machine,
)

NORM = NormSpec(1e-6)
ATTENTION = AttentionSpec(4, 2, 8, RopeSpec(10000.0, 8), 8**-0.5, NORM, QkNorm.HEAD)
SPEC = ModelSpec(
    architecture="Qwen3ForCausalLM",
    vocab_size=100,
    model_size=32,
    layers=(LayerSpec(ATTENTION, MlpSpec(48)),) * 3,
    norm=NORM,
    tied_embeddings=True,
    max_context_tokens=200,
)
PLENTY = Machine(num_cpus=2, free_bytes=64 << 30)


def plan(tmp_path, machine=PLENTY, **settings):
    return make_plan(Config(model=tmp_path, **settings), SPEC, emit(SPEC), machine)


def test_bytes_and_parameters_are_counted(tmp_path):
    per_layer = 32 * (4 + 2 * 2) * 8 + 4 * 8 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 8
    assert num_parameters(emit(SPEC)) == 3 * per_layer + 100 * 32 + 32
    assert kv_token_bytes(emit(SPEC)) == 3 * 2 * 2 * 8 * 4
    assert meta_bytes(emit(SPEC), 16) == 3 * 2 * 2 * 8 * 2
    assert meta_bytes(emit(SPEC, block_tokens=64), 64) == 4 * meta_bytes(emit(SPEC), 16)
    assert plan(tmp_path).weight_bytes == 4 * num_parameters(emit(SPEC))


@pytest.mark.parametrize(("free", "want"), [(2 << 30, 1 << 29), (64 << 30, 1 << 30)])
def test_the_cache_takes_a_quarter_of_the_free_memory_and_at_most_a_gibibyte(tmp_path, free, want):
    got = plan(tmp_path, Machine(2, free))
    block_bytes = kv_token_bytes(emit(SPEC)) * 16 + meta_bytes(emit(SPEC), 16)
    assert want - block_bytes < got.kv_bytes <= want


def test_a_small_cache_cuts_the_context(tmp_path):
    block_bytes = kv_token_bytes(emit(SPEC)) * 16 + meta_bytes(emit(SPEC), 16)
    got = plan(tmp_path, cache=CacheConfig(memory_bytes=block_bytes * 5))
    assert (got.num_blocks, got.max_context_tokens, got.max_blocks) == (5, 80, 5)


def test_threads_are_the_cpus_unless_set(tmp_path):
    assert plan(tmp_path).threads == 2
    assert plan(tmp_path, cpu=CpuConfig(threads=5)).threads == 5


@pytest.mark.parametrize(
    ("machine", "settings", "words"),
    [
        (Machine(2, 1 << 19), {}, r"not enough memory: weights 0 MiB.*0 MiB is free"),
        (
            PLENTY,
            {"cache": CacheConfig(memory_bytes=1 << 40)},
            "not enough memory.*KV cache 1,048,576 MiB",
        ),
        (
            PLENTY,
            {"cache": CacheConfig(memory_bytes=100)},
            r"cache\.memory_bytes \(100\) must hold",
        ),
        (PLENTY, {"max_context_tokens": 201}, r"max_context_tokens must be in 2\.\.200.*got 201"),
        (PLENTY, {"max_context_tokens": 1}, "got 1"),
        (
            PLENTY,
            {"sparse": SparseConfig(budget_tokens=127)},
            r"sparse\.budget_tokens must be at least 128, 8 units of 16 .* got 127",
        ),
        (
            PLENTY,
            {"sparse": SparseConfig(budget_tokens=399), "cache": CacheConfig(block_tokens=50)},
            r"sparse\.budget_tokens must be at least 400, 8 units of 50 .* got 399",
        ),
    ],
)
def test_what_cannot_fit_is_refused_in_one_line(tmp_path, machine, settings, words):
    with pytest.raises(ConfigError, match=words) as error:
        plan(tmp_path, machine, **settings)
    assert "\n" not in str(error.value)


def test_this_machine_can_be_read():
    machine = read_machine()
    assert machine.num_cpus >= 1 and machine.free_bytes > 1 << 20


BOX, OF_CPU = "/sys/fs/cgroup/pod/box", "/sys/fs/cgroup/cpu"
OLD = {"/proc/self/cgroup": "4:cpu,cpuacct:/pod/box\n3:memory:/pod/box\n1:name=systemd:/pod/box"}


@pytest.fixture
def machine(monkeypatch):
    """What is read of a machine with six CPUs and these files of the kernel's."""

    def read(files):
        files = {"/proc/self/cgroup": "1:name=systemd:/\n0::/pod/box"} | files
        monkeypatch.setattr(
            "vivace.engine.plan._lines", lambda path: files.get(str(path), "").splitlines()
        )
        return read_machine()

    monkeypatch.setattr("vivace.engine.plan._meminfo_available", lambda: 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(2, 8)))
    return read


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 6),
        ({f"{BOX}/cpu.max": "max 100000"}, 6),
        ({f"{BOX}/cpu.max": "400000 100000"}, 4),
        ({f"{BOX}/cpu.max": "max 100000", "/sys/fs/cgroup/pod/cpu.max": "250000 100000"}, 2),
        ({f"{BOX}/cpu.max": "50000 100000"}, 1),
        ({f"{BOX}/cpu.max": "6400000 100000"}, 6),
        ({"/sys/fs/cgroup/cpu.max": "300000 100000"}, 3),  # a container sees its own as the root
        ({"/sys/fs/cgroup/other/cpu.max": "100000 100000"}, 6),
        (OLD | {f"{OF_CPU}/cpu.cfs_quota_us": "-1", f"{OF_CPU}/cpu.cfs_period_us": "100000"}, 6),
        (
            OLD | {f"{OF_CPU}/cpu.cfs_quota_us": "200000", f"{OF_CPU}/cpu.cfs_period_us": "100000"},
            2,
        ),
    ],
)
def test_cpus_are_those_of_the_affinity_and_of_every_cgroup_s_quota(machine, files, cpus):
    assert machine(files) == Machine(num_cpus=cpus, free_bytes=100)


def test_memory_is_what_every_cgroup_leaves(machine):
    files = {
        f"{BOX}/memory.max": "max",
        f"{BOX}/memory.current": "5",
        "/sys/fs/cgroup/pod/memory.max": "70",
        "/sys/fs/cgroup/pod/memory.current": "30",
    }
    assert machine(files).free_bytes == 40
    assert machine(files | {"/sys/fs/cgroup/pod/memory.current": "90"}).free_bytes == 0
    stat = "anon 10\nfile 18\ninactive_file 12\nactive_file 3\nfile_mapped 2"
    assert machine(files | {"/sys/fs/cgroup/pod/memory.stat": stat}).free_bytes == 55
    at = "/sys/fs/cgroup/memory/pod/box/memory"
    old = {f"{at}.limit_in_bytes": "60", f"{at}.usage_in_bytes": "50", f"{at}.stat": stat}
    assert machine(OLD | old).free_bytes == 25
    old[f"{at}.stat"] += "\ntotal_inactive_file 20\ntotal_active_file 10"
    assert machine(OLD | old).free_bytes == 40


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            lambda: SchedulerConfig(max_step_tokens=4, max_running=8),
            "each decodes one token a step",
        ),
        (lambda: SchedulerConfig(max_running=0), r"scheduler\.max_running .* at least 1, got 0"),
        (lambda: CacheConfig(block_tokens=0), r"cache\.block_tokens"),
        (lambda: CpuConfig(threads=0), r"cpu\.threads"),
        (lambda: SparseConfig(budget_tokens=0), r"sparse\.budget_tokens .* at least 1, got 0"),
        (lambda: SparseConfig(min_context=-1), r"sparse\.min_context"),
        (lambda: SparseConfig(layers_dense=-1), r"sparse\.layers_dense"),
        (lambda: SparseConfig(min_kept_mass=1.1), r"sparse\.min_kept_mass"),
        (lambda: SparseConfig(measure_every=0), r"sparse\.measure_every"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, words):
    with pytest.raises(ConfigError, match=words):
        settings()
