"""Where compiled kernels are kept: Triton's own cache, a folder for each Triton and target, that can be moved and shipped."""

import json
from collections.abc import Mapping
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import FileCacheManager

GROUP = "__grp__{}"  # the file in which Triton lists those of one kernel


class MovableCache:
    """Triton's cache of files, but for its lists of a kernel's files: Triton writes their whole paths there, which hold in
    one place only."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._files = FileCacheManager(key, override=override, dump=dump)
        self.get_file = self._files.get_file
        self.put = self._files.put

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The files of one kernel by name; None if one is missing or they were never written."""
        listed = self.get_file(GROUP.format(filename))
        if listed is None:
            return None
        paths = {
            name: self.get_file(name) for name in json.loads(Path(listed).read_text())["names"]
        }
        found = {name: path for name, path in paths.items() if path is not None}
        return found if len(found) == len(paths) else None

    def put_group(self, filename: str, group: Mapping[str, str]) -> str:
        """List the files of one kernel, whose last is written: from now on it is found."""
        path: str = self.put(json.dumps({"names": list(group)}), GROUP.format(filename))
        return path


def folder_of(cache_dir: Path, target: GPUTarget) -> Path:
    """The sub-folder of one Triton and target, such as `triton-3.7.1/cuda-90`."""
    return cache_dir / f"triton-{triton.__version__}" / f"{target.backend}-{target.arch}"


def use(cache_dir: Path, target: GPUTarget) -> None:
    """Have Triton, in this whole process, look here first and keep here what it compiles."""
    folder = folder_of(cache_dir, target)
    folder.mkdir(parents=True, exist_ok=True)
    triton.knobs.cache.dir = str(folder)
    triton.knobs.cache.manager_class = MovableCache
