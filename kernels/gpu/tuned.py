"""How kernels are run where that was measured: JSON by device, in `kernels/tuned/`, written by `make gpu-tune`.

Figures of another minor version of Triton say nothing about this one's code, so their file is not used.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "tuned"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Config:
    """Tile sizes, by the names of a kernel's constexprs, and how it is compiled."""

    tiles: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


Configs = Mapping[str, Mapping[str, Config]]  # by op, then by bucket of shapes


def file_of(device: str, folder: Path | None = None) -> Path:
    """The file of a device, by the name that its driver gives it, in FOLDER if no other is named."""
    return (folder or FOLDER) / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def minor(version: str) -> str:
    """`3.7` of `3.7.1`."""
    return ".".join(version.split(".")[:2])


def read(device: str, version: str, folder: Path | None = None) -> Configs:
    """What was measured on this device with this Triton; nothing, with a log line, if it was with another."""
    path = file_of(device, folder)
    if not path.is_file():
        return {}
    written = json.loads(path.read_text(encoding="utf-8"))
    if minor(written["triton"]) != minor(version):
        _log.warning(
            "%s is of triton %s and not used with %s: run `make gpu-tune`",
            path.name,
            written["triton"],
            version,
        )
        return {}
    return {
        op: {bucket: Config(**entry) for bucket, entry in buckets.items()}
        for op, buckets in written["configs"].items()
    }


def write(device: str, version: str, configs: Configs, folder: Path | None = None) -> Path:
    """Keep what was measured; what the file has of other ops stays if it is of the same Triton."""
    kept = {op: dict(buckets) for op, buckets in read(device, version, folder).items()}
    for op, buckets in configs.items():
        kept.setdefault(op, {}).update(buckets)
    entries = {
        op: {bucket: asdict(config) for bucket, config in sorted(buckets.items())}
        for op, buckets in sorted(kept.items())
    }
    path = file_of(device, folder)
    text = json.dumps({"device": device, "triton": version, "configs": entries}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return path
