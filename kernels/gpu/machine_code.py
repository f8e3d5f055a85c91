"""What a compiled kernel takes of a GPU and which instructions it has, read from its binary; and what is wrong with that.

NVIDIA's tools for it come with Triton; AMD's assembly says it in words. Nothing here needs a GPU.
"""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton

from vivace.kernels.gpu.target import MAX_REGISTERS, Target

REGISTER_FILE = 65_536  # of a multiprocessor of NVIDIA's
GRAIN = 8  # registers of a thread are handed out by
# What a module's EXPECT may name, by the machine code that shows it.
MEANT = {
    "HGMMA": re.compile(r"\bHGMMA\b"),  # Hopper's products, of a warp group
    "HMMA": re.compile(r"\bHMMA\b"),  # Ampere's products, of a warp
    "IMMA": re.compile(r"\b(IMMA|IGMMA)\b"),
    "UTMALDG": re.compile(r"\bUTMALDG\b"),  # boxes of a tensor, by the TMA
    "16-byte loads": re.compile(r"\b((LDG|LDGSTS)\.E\S*\.128\S*|UTMALDG|UBLKCP)\b"),
    "16-byte stores": re.compile(r"\b(STG\.E\S*\.128|UTMASTG)\b"),
}
SPILLS = {"STL": re.compile(r"\bSTL\b"), "LDL": re.compile(r"\bLDL\b")}


@dataclass(frozen=True, slots=True)
class MachineCode:
    """Of one kernel."""

    registers: int  # of a thread
    stack_bytes: int  # of a thread; more than none: registers are spilled
    shared_bytes: int  # of a program
    num_threads: int
    counts: Mapping[str, int]  # instructions, by the names of MEANT and SPILLS


def read(kernel: Any, target: Target) -> MachineCode:
    """Of Triton's `CompiledKernel`."""
    num_threads = kernel.metadata.num_warps * target.triton.warp_size
    if target.triton.backend == "hip":
        text = kernel.asm["amdgcn"]
        stack = _number(r"\.private_segment_fixed_size: +(\d+)", text)
        # Scalar registers are spilled to lanes of vector registers, not to memory.
        counts = {"VGPR": _number(r"\.vgpr_spill_count: +(\d+)", text)}
        registers = _number(r"\.vgpr_count: +(\d+)", text)
        return MachineCode(registers, stack, kernel.metadata.shared, num_threads, counts)
    [binary] = (path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary)
    code = _output(triton.knobs.nvidia.nvdisasm.path, "-c", binary)
    stack = _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    counts = {name: len(seen.findall(code)) for name, seen in (MEANT | SPILLS).items()}
    registers = _number(r"REG:(\d+)", usage)
    return MachineCode(registers, stack, kernel.metadata.shared, num_threads, counts)


def problems(code: MachineCode, target: Target, meant: Sequence[str]) -> list[str]:
    """What must not be, in words: spills, more than there is, instructions that are missing."""
    found = []
    spills = {name: count for name, count in code.counts.items() if name not in MEANT and count}
    if code.stack_bytes or spills:
        found.append(f"spills: {code.stack_bytes} bytes of stack, {spills}")
    if target.max_shared_bytes is not None and code.shared_bytes > target.max_shared_bytes:
        found.append(f"{code.shared_bytes} bytes shared of {target.max_shared_bytes}")
    if target.triton.backend == "cuda":
        in_all = code.num_threads * -(-code.registers // GRAIN) * GRAIN
        if code.registers > MAX_REGISTERS or in_all > REGISTER_FILE:
            found.append(f"{code.registers} registers in each of {code.num_threads} threads")
    missing = [name for name in meant if not code.counts[name]]
    if missing:
        found.append(f"no {', no '.join(missing)}")
    return found


def _number(pattern: str, text: str) -> int:
    """The sum over the kernels of a file, of which there is one."""
    found = re.findall(pattern, text)
    assert found, f"no {pattern} in what describes a kernel"
    return sum(map(int, found))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
