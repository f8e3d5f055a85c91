"""The reference backend on the device: against the C++ library op by op, against transformers on tiny models."""

from collections.abc import Iterator, Mapping
from functools import partial

from tests.gpu.generation import parity_parts
from tests.gpu.op_cases import OpCase, compare, op_cases
from tests.gpu.results import Result
from tests.gpu.setting import Part, Setting
from vivace.kernels.backend import Backend, load


def against_cpp(setting: Setting, case: OpCase) -> Iterator[Result]:
    """The same inputs to both."""
    error = compare(case, setting.reference(), load(Backend.CPU, threads=1))
    yield Result(f"parity/op/{case.name}", error <= case.tolerance, error)


def parts() -> Mapping[str, Part]:
    """Ops, then models."""
    ops: dict[str, Part] = {
        f"op/{case.name}": partial(against_cpp, case=case) for case in op_cases()
    }
    return {**ops, **parity_parts()}
