"""A file of packed weights is taken whole and right or not at all."""

import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from vivace.engine.models import packed_cache
from vivace.engine.models.packed_cache import PAGE, Unusable, digest, read, write

KEY = bytes(range(32))
NUM_BYTES = 3 * PAGE


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).integers(0, 256, NUM_BYTES, np.uint8)


@pytest.fixture
def file(tmp_path, data):
    path = tmp_path / "folder" / "model.packed"
    write(path, KEY, data, threads=2)
    return path


def spoil(path, at, byte=None):
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1 if byte is None else byte]))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("has_huge", [True, False])
def test_what_is_written_is_read(file, data, has_huge, monkeypatch):
    monkeypatch.setattr(packed_cache, "_huge_bytes", lambda array: len(array) * has_huge)
    got, how = read(file, KEY, NUM_BYTES, threads=2)
    assert np.array_equal(got, data)
    assert not got.flags.writeable or not has_huge
    want = "mapped from" if has_huge else "read into memory from"
    assert how == f"{want} {file}, {'100%' if has_huge else '0%'} in huge pages"
    assert names(file.parent) == [file.name]


def test_memory_of_huge_pages_is_told_from_other_memory():
    small = np.zeros(1 << 16, np.uint8)
    assert packed_cache._huge_bytes(small) in (0, *range(PAGE, 1 << 40, PAGE))
    huge = packed_cache.huge(4 * PAGE)
    huge[:] = 1
    has_them = "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    assert (packed_cache._huge_bytes(huge) >= 3 * PAGE) == has_them


PLACES = {
    "magic": 0,
    "key": 8,
    "bytes": 40,
    "digest": 48,
    "first": PAGE,
    "middle": PAGE + 1234567,
    "last": PAGE + NUM_BYTES - 1,
}


@pytest.mark.parametrize("is_mapped", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_byte_that_changed_is_found(file, place, is_mapped, monkeypatch):
    monkeypatch.setattr(packed_cache, "_huge_bytes", lambda array: len(array) * is_mapped)
    spoil(file, PLACES[place])
    with pytest.raises(Unusable):
        read(file, KEY, NUM_BYTES, threads=1)


def test_parts_that_changed_places_are_found(data):
    with ThreadPoolExecutor(2) as pool:
        whole = digest(data, pool)
        for size in (8, 4096, 65536, PAGE):
            swapped = data.copy()
            swapped[:size], swapped[size : 2 * size] = data[size : 2 * size], data[:size]
            assert digest(swapped, pool) != whole
        assert digest(data.copy(), pool) == whole
    with ThreadPoolExecutor(1) as pool:
        assert digest(data, pool) == whole


@pytest.mark.parametrize("length", [0, 10, PAGE - 1, PAGE, PAGE + NUM_BYTES - 1])
def test_a_file_that_is_cut_is_found(file, length):
    os.truncate(file, length)
    with pytest.raises(Unusable):
        read(file, KEY, NUM_BYTES, threads=1)


def test_a_file_that_is_too_long_or_of_another_size_is_found(file):
    with pytest.raises(Unusable, match="truncated or corrupt"):
        read(file, KEY, NUM_BYTES + PAGE, threads=1)
    os.truncate(file, PAGE + NUM_BYTES + 1)
    with pytest.raises(Unusable, match="truncated or corrupt"):
        read(file, KEY, NUM_BYTES, threads=1)


def test_another_key_is_stale(file):
    with pytest.raises(Unusable, match="stale"):
        read(file, KEY[::-1], NUM_BYTES, threads=1)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Unusable):
        read(tmp_path / "pipe", KEY, NUM_BYTES, threads=1)
    with pytest.raises(IsADirectoryError):
        read(tmp_path, KEY, NUM_BYTES, threads=1)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none", KEY, NUM_BYTES, threads=1)


def test_a_new_file_stands_for_the_old_and_who_has_that_keeps_it(file, data):
    old, _ = read(file, KEY, NUM_BYTES, threads=1)
    write(file, KEY[::-1], data[::-1].copy(), threads=1)
    assert np.array_equal(old, data)
    got, _ = read(file, KEY[::-1], NUM_BYTES, threads=1)
    assert np.array_equal(got, data[::-1])
    assert names(file.parent) == [file.name]


def test_what_a_killed_process_left_is_written_over(file, data):
    left = file.with_name(f"{file.name}.tmp")
    left.write_bytes(b"x" * (2 * PAGE + NUM_BYTES))
    write(file, KEY, data, threads=1)
    assert names(file.parent) == [file.name]
    assert np.array_equal(read(file, KEY, NUM_BYTES, threads=1)[0], data)


def test_of_two_that_write_at_once_one_is_refused(file, data):
    left = file.with_name(f"{file.name}.tmp")
    with left.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            write(file, KEY[::-1], data, threads=1)
        assert names(file.parent) == [file.name, left.name]  # it is the other's to remove
    read(file, KEY, NUM_BYTES, threads=1)


def test_a_file_that_was_renamed_before_it_was_locked_is_left_alone(file, data, monkeypatch):
    """Else the file that others have mapped would be cut to nothing."""
    lock = fcntl.flock

    def late(fd, how):
        file.with_name(f"{file.name}.tmp").rename(file)  # the other process is done
        lock(fd, how)

    file.with_name(f"{file.name}.tmp").write_bytes(b"done")
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BlockingIOError):
        write(file, KEY, data, threads=1)
    assert file.read_bytes() == b"done"


def test_a_link_under_the_temporary_name_is_not_followed(file, data, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    file.with_name(f"{file.name}.tmp").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        write(file, KEY, data, threads=1)
    assert victim.read_bytes() == b"mine"


FULL = """
import resource, sys
import numpy as np
from pathlib import Path
from vivace.engine.models.packed_cache import PAGE, write
resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PAGE, 2 * PAGE))
try:
    write(Path(sys.argv[1]), bytes(32), np.ones(3 * PAGE, np.uint8), threads=1)
except OSError as error:
    print(error.strerror)
"""


def test_a_disk_that_is_full_leaves_nothing_behind_and_the_old_file(file, data):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "File too large\n"
    assert names(file.parent) == [file.name]
    assert np.array_equal(read(file, KEY, NUM_BYTES, threads=1)[0], data)
