"""What holds for every test: no memory that looks zero by luck, one thread, the same examples, Triton interpreted."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported; 0: see tests/aot
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

torch.set_num_threads(1)
# Fills what `torch.empty` and its kin return: floats with NaN, integers with their largest value.
torch.use_deterministic_algorithms(True)
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of checkpoints and recorded references beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("shared/data is not beside the repository")
    return SHARED_DATA
