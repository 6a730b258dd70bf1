"""Where a result was made: source, packages, processor, memory; and the lock for what needs the machine alone."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "datasets",
    "openvino",
    "onnx",
    "onnxruntime",
    "faster-coco-eval",
    "safetensors",
)
FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "amx_fp16", "asimddp", "i8mm", "sve"),
)
"""Processor features that decide how fast, and on old ones how exactly, small numbers are multiplied."""

LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables that keep oneDNN, in OpenVINO and in PyTorch, from using all of these features."""


def machine() -> dict[str, Any]:
    """What a result needs to be understood elsewhere, JSON-able; quick, and without importing torch."""
    return {**_constant(), "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None}


@functools.cache
def _constant() -> dict[str, Any]:
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cpu, flags = _processor()
    return {
        "qbench": _version("qbench"),
        "git": _git(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "os": platform.platform(),
        "cpu": cpu,
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "cpu_limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "cores": len(affinity),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": _gpu(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[str, set[str]]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                return name, set(value.split())
    return name, flags


def _run(*command: str) -> str | None:
    """What the program prints, None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return None


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the source, and whether files differ from it; None outside of a repository."""
    # An environment inside somebody's repository is not that repository's source.
    if _run("git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _run("git", "-C", str(folder), "rev-parse", "HEAD")
    changed = _run("git", "-C", str(folder), "status", "--porcelain", "--", ".")
    return {"commit": commit, "dirty": bool(changed)} if commit else None


def _gpu() -> str | None:
    names = _run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return "; ".join(names.splitlines()) if names else None


@contextmanager
def exclusive(waiting: Callable[[str], object] = lambda _: None, path: Path | None = None) -> Iterator[None]:
    """Hold the machine alone: one process of any user at a time, the others wait.

    The lock is released when its holder ends, however it ends.

    Args:
        waiting: called once, with a description of the holder, when somebody else has the machine.
        path: of the lock file; None means a fixed name in the folder for temporary files.
    """
    import fcntl  # not on Windows, where only this function fails

    descriptor = _open(path or Path(tempfile.gettempdir()) / "qbench-exclusive.lock")
    with open(descriptor, "r+", encoding="utf-8") as file:  # noqa: PTH123  a descriptor
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting(file.read().strip() or "another qbench process")
            fcntl.flock(file, fcntl.LOCK_EX)
        _write(file.fileno(), f"process {os.getpid()} of {_user()}, since {time.strftime('%H:%M:%S')}")
        try:
            yield
        finally:
            _write(file.fileno(), "")


def _open(path: Path) -> int:
    """Open the lock file, which belongs to whoever came first, and is for everybody."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(FileExistsError):
        # Linux refuses to open another user's file in a shared folder with O_CREAT alone.
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        os.fchmod(descriptor, 0o666)
        return descriptor
    return os.open(path, flags)


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _user() -> str:
    try:
        return psutil.Process().username()
    except (psutil.Error, KeyError):
        return f"user {os.getuid()}"
