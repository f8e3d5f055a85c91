"""The file that keeps a model's packed weights from one start to the next. Decides whether one can be believed, and how it
comes into memory; knows nothing of what lies in it.

A header that takes the first 2 MiB, then the weights as they lie in memory, a multiple of 2 MiB. Nothing of a file is
believed: its length, its key and the digest of every byte must be right, or `Unusable` is raised and it is written anew.
"""

import fcntl
import hashlib
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from vivace.kernels.memory.cpu import HUGE_BYTES, huge

Array = np.ndarray[Any, np.dtype[np.uint8]]

PAGE = HUGE_BYTES  # sections begin at one, and are read, written and digested by them
HEADER = struct.Struct("<8s32sQ32s")  # magic, key, bytes of weights, digest of the weights
MAGIC = b"VIVACEW1"
ROW = 8192  # words that are digested at a time: few enough for the first cache, enough for NumPy
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: no change of one word is lost
RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
HUGE = re.compile(r"(?:AnonHugePages|ShmemPmdMapped|FilePmdMapped): +(\d+) kB")


class Unusable(Exception):
    """Why a file is not taken; it is no error of anybody's."""


def read(path: Path, key: bytes, num_bytes: int, *, threads: int) -> tuple[Array, str]:
    """The weights, and how they came into memory. Raises Unusable, or OSError if there is no such file or it cannot be read.

    Mapped, if the kernel shows huge pages for a mapping of this file; else read into huge pages of their own, since small
    pages are read at a fraction of the bandwidth.
    """
    with open(path, "rb", buffering=0, opener=_opened) as file:
        fd = file.fileno()
        wanted = _wanted_digest(fd, key, num_bytes)
        with ThreadPoolExecutor(threads) as pool:
            data = mmap.mmap(fd, num_bytes, access=mmap.ACCESS_READ, offset=PAGE)
            with suppress(OSError):
                data.madvise(mmap.MADV_HUGEPAGE)
            mapped = np.frombuffer(data, np.uint8)
            _digest_of(mapped[:PAGE])  # touches the first of the pages
            if is_mapped := _huge_bytes(mapped) > 0:
                found, got = mapped, digest(mapped, pool)
            else:
                found, got = _read_all(fd, num_bytes, pool)
    if got != wanted:
        raise Unusable("it is corrupt")
    share = min(1.0, _huge_bytes(found) / num_bytes)
    how = "mapped from" if is_mapped else "read into memory from"
    return found, f"{how} {path}, {share:.0%} in huge pages"


def write(path: Path, key: bytes, data: Array, *, threads: int) -> None:
    """Replace the file, at once and whole or not at all. Raises OSError; then nothing of it is left.

    Whoever has the old one mapped keeps it. Of two processes that write at once, one is refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(threads) as pool:
        header = HEADER.pack(MAGIC, key, len(data), digest(data, pool))
    temporary = path.with_name(f"{path.name}.tmp")
    with _locked(temporary) as fd:
        try:
            os.truncate(fd, 0)
            _write_at(fd, header, 0)
            for at in range(0, len(data), PAGE):
                _write_at(fd, data[at : at + PAGE].data, PAGE + at)
            os.fsync(fd)
            temporary.replace(path)
        except OSError:
            temporary.unlink()
            raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # the new name outlives a power cut
    finally:
        os.close(folder)


def digest(data: Array, pool: ThreadPoolExecutor) -> bytes:
    """Of all bytes, in their order; at about the speed of memory, which no hash of the library's has. Against accidents:
    who means to forge a file can write the digest too."""
    pages = (data[at : at + PAGE] for at in range(0, len(data), PAGE))
    return hashlib.sha256(b"".join(pool.map(_digest_of, pages))).digest()


def _digest_of(page: Array) -> bytes:
    """A polynomial in each column of words, modulo 2**64."""
    sums = np.zeros(ROW, np.uint64)
    for row in page.view(np.uint64).reshape(-1, ROW):
        sums *= FACTOR
        sums += row
    return hashlib.sha256(sums.data).digest()


def _opened(path: str, flags: int) -> int:
    """Without waiting for the writer of a pipe that passes for a file."""
    return os.open(path, flags | os.O_NONBLOCK)


def _wanted_digest(fd: int, key: bytes, num_bytes: int) -> bytes:
    status = os.fstat(fd)
    header = os.pread(fd, HEADER.size, 0) if stat.S_ISREG(status.st_mode) else b""
    if len(header) < HEADER.size:
        raise Unusable("it is no file of packed weights")
    magic, found_key, found_bytes, wanted = HEADER.unpack(header)
    if magic != MAGIC:
        raise Unusable("it is no file of packed weights, or of another version")
    if found_key != key:
        raise Unusable("it is stale: of another checkpoint, setting or version")
    if found_bytes != num_bytes or status.st_size != PAGE + num_bytes:
        raise Unusable(f"it is truncated or corrupt: {status.st_size} bytes")
    assert isinstance(wanted, bytes)
    return wanted


def _read_all(fd: int, num_bytes: int, pool: ThreadPoolExecutor) -> tuple[Array, bytes]:
    """The weights and their digest, each page digested while it is still in the CPU's caches."""
    data = huge(num_bytes)

    def read_page(at: int) -> bytes:
        page, done = data[at : at + PAGE], 0
        while done < PAGE:
            count = os.preadv(fd, [page[done:].data], PAGE + at + done)
            if count == 0:
                raise Unusable("it was truncated while it was read")
            done += count
        return _digest_of(page)

    digests = b"".join(pool.map(read_page, range(0, num_bytes, PAGE)))
    return data, hashlib.sha256(digests).digest()


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A file that this process alone writes. What a killed process left under the name is taken over, so no more than one
    such piece can lie about."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had the lock may have renamed the file since it was opened here: then it is in use.
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(fd)):
            raise BlockingIOError("another process has just written it")
        yield fd
    finally:
        os.close(fd)


def _write_at(fd: int, data: bytes | memoryview, at: int) -> None:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest, at)
        rest, at = rest[count:], at + count


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _huge_bytes(array: Array) -> int:
    """Bytes in huge pages of the mappings that an array lies in, by the kernel's own account."""
    start, end = _address(array), _address(array) + len(array)
    found, is_ours = 0, False
    with Path("/proc/self/smaps").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if place := RANGE.match(line):
                is_ours = int(place[1], 16) < end and start < int(place[2], 16)
            elif is_ours and (kib := HUGE.match(line)):
                found += int(kib[1]) * 1024
    return found
