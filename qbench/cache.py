"""Folders of what is kept between runs: written whole or not at all, size-limited, shared by processes."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from qbench.errors import UserError

T = TypeVar("T")


class Damaged(Exception):  # noqa: N818  it is an answer, not a failure
    """An entry is missing or is not what was written."""


def cache_dir() -> Path:
    """The folder that QBENCH_CACHE names; by default ~/.cache/qbench."""
    return Path(os.environ.get("QBENCH_CACHE") or Path.home() / ".cache" / "qbench")


def cache_limit() -> int:
    """How many bytes of images are kept: QBENCH_CACHE_GB gigabytes, by default 20.

    Raises:
        UserError: the variable is not a positive number.
    """
    text = os.environ.get("QBENCH_CACHE_GB", "20")
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise UserError(f"QBENCH_CACHE_GB={text!r} is not a number of gigabytes; set it to 20, for example")
    return limit


def obtain(
    folder: Path, key: str, read: Callable[[Path], T], write: Callable[[Path], None], size: int, limit: int
) -> T:
    """Read an entry; write it first where there is none, or where it is damaged.

    Only one process writes an entry, the others wait for it. The entries used least recently make room for it.

    Args:
        folder: of the entries.
        key: name of the entry, which is a folder itself.
        read: raises `Damaged` when the entry is not what was written.
        write: fills an empty folder.
        size: bytes that the entry will take.
        limit: bytes that all entries may take.

    Raises:
        UserError: the folder cannot be written, or the entry is larger than the limit.
    """
    entry = folder / key
    try:
        return _touch(entry, read)
    except Damaged:
        pass
    if size > limit:
        gigabytes = f"{size / 1e9:.1f} GB of {limit / 1e9:.1f} GB"
        raise UserError(f"the cache {folder} would need {gigabytes}; set QBENCH_CACHE_GB, or use fewer images")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{key}.lock"):
            try:
                return _touch(entry, read)
            except Damaged:
                shutil.rmtree(entry, ignore_errors=True)
            _evict(folder, key, limit - size)
            _write(folder / f"{key}.tmp", entry, write)
            return _touch(entry, read)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the cache {folder} cannot be written: {reason}; set QBENCH_CACHE") from error


def _touch(entry: Path, read: Callable[[Path], T]) -> T:
    found = read(entry)
    with suppress(OSError):  # a cache that may only be read, or an entry evicted just now: what was read stays valid
        os.utime(entry)
    return found


def _write(temporary: Path, entry: Path, write: Callable[[Path], None]) -> None:
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir()
    try:
        write(temporary)
        temporary.rename(entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file; the kernel lets go of it when the process ends, however it ends.

    Raises:
        BlockingIOError: somebody else holds it, and `wait` is off.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _evict(folder: Path, keep: str, limit: int) -> None:
    """Remove what killed processes left, then the entries used least recently, until the rest is within the limit."""
    entries = [path for path in folder.iterdir() if path.is_dir() and path.stem != keep]
    entries.sort(key=lambda path: (path.suffix != ".tmp", -_time(path)))
    used = 0
    for path in entries:
        used += _size(path)
        if path.suffix == ".tmp" or used > limit:
            try:
                with _lock(folder / f"{path.stem}.lock", wait=False):
                    shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                continue  # it is being written


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return sum(file.stat().st_size for file in path.iterdir())
    except FileNotFoundError:
        return 0
