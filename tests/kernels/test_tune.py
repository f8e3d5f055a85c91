"""The choice among candidates, without a GPU: times are made up, numbers are the interpreter's."""

import pytest
import torch

from tests.gpu import tune
from vivace.kernels.gpu.launcher import Config, Launcher

pytestmark = pytest.mark.triton
DEFAULT, GOOD, SLOW, WRONG = (Config(num_warps=n) for n in (1, 2, 4, 8))
TIMES = {1: (10.0, 10.0), 2: (2.0, 12.0), 4: (9.0, 11.0), 8: (1.0, 1.0)}  # by warps, of each shape


class Op:
    """Doubles, but with 8 warps, and looks its config up when it is bound."""

    @staticmethod
    def bind(launcher):
        config = launcher.config("double", "all", DEFAULT)

        def run(out, x):
            run.config = config
            out.copy_(x if config == WRONG else 2 * x)

        return run


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(tune, "module_of", lambda field: Op)
    monkeypatch.setattr(tune, "candidates_of", lambda field, key: [SLOW, WRONG, GOOD])
    monkeypatch.setattr(tune, "MIN_BYTES", 1 << 10)

    def measure(run, copies):
        run(*copies[0].args)
        return TIMES[run.config.num_warps][len(copies[0].args[0]) > 1]

    monkeypatch.setattr(tune, "measure", measure)
    return [tune.Call("double", (torch.empty(n, 3), torch.ones(n, 3)), {}) for n in (1, 2)]


def test_the_candidate_with_the_least_mean_share_of_the_defaults_time_is_chosen(calls, capsys):
    launcher = Launcher("cpu")
    assert tune.tuned_of(launcher, ("double", "all"), calls, DEFAULT) == GOOD
    assert launcher.configs["double", "all"] == DEFAULT
    assert f"{WRONG}: gives other numbers" in capsys.readouterr().out


def test_the_default_stays_where_nothing_is_faster(calls, monkeypatch):
    monkeypatch.setattr(tune, "candidates_of", lambda field, key: [Config(num_warps=16)])
    monkeypatch.setitem(TIMES, 16, (5.0, 21.0))
    assert tune.tuned_of(Launcher("cpu"), ("double", "all"), calls, DEFAULT) == DEFAULT


def test_calls_are_copied_until_they_do_not_fit_the_cache(calls):
    copies = tune.copies_of(calls[0])
    assert len(copies) == 1 + 1024 // 24
    assert len({copy.args[1].data_ptr() for copy in copies}) == len(copies)


def test_a_step_is_recorded_under_the_configs_that_its_launches_use():
    launcher = Launcher("cpu")
    recording = tune.Recording(launcher)
    ops = recording.ops()
    for T in (2, 3):
        ops.add_rmsnorm(*(torch.ones(T, 8) for _ in range(4)), torch.ones(8), eps=1e-6)
    [(key, by_shapes)] = recording.calls.items()
    assert key == ("add_rmsnorm", "all") and len(by_shapes) == 2
    assert recording.defaults[key] == launcher.configs[key]
