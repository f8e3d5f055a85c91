"""The machine that results are of: what it is and how its device is clocked. Reads settings, never changes one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

ROOT = Path(__file__).parents[2]
ABOUT = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total"
STATE = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
CUDA_FOLDERS = ("/usr/local/cuda", "/opt/cuda")


def describe(device: str) -> dict[str, Any]:
    """Versions, device and commit. Does not touch the device through torch: workers do."""
    is_gpu = device.startswith("cuda")
    about = query(ABOUT) if is_gpu else None
    return {
        "device": about["name"] if about else device,
        "driver": about["driver_version"] if about else None,
        "limits": about,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "cpus": os.cpu_count(),
        "commit": output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed_files": output("git", "-C", str(ROOT), "status", "--porcelain"),
    }


def clocks(device: str) -> dict[str, str] | None:
    """Of the GPU at this moment; None where there is none."""
    return query(STATE) if device.startswith("cuda") else None


def query(fields: str) -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU."""
    said = output("nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader")
    if not said:
        return None
    return dict(zip(fields.split(","), said.split(", "), strict=False))


def l2_bytes(device: str) -> int:
    """Of the GPU's second-level cache; 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def compute_sanitizer() -> str | None:
    """CUDA's memory checker, on the PATH or where CUDA is; None if it is not there."""
    found = shutil.which("compute-sanitizer")
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), *CUDA_FOLDERS]
    places = [Path(home) for home in homes if home]
    places += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    candidates = [place / sub for place in places for sub in ("bin", "compute-sanitizer")]
    return found or next(
        (hit for at in candidates if (hit := shutil.which("compute-sanitizer", path=str(at)))), None
    )


def output(*command: str) -> str | None:
    """What a command prints; None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
