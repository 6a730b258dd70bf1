"""Processes for runs: the parent's side of the fork server, with time and memory limits on whole process groups."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

_TICK = 0.1  # seconds between looks at memory and clocks
_SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""A process with threads cannot be forked safely: numpy's and pyarrow's are made on import, torch's at first use."""


@dataclass
class Ended:
    """How a process ended: by itself, or killed for its time or memory."""

    id: str
    how: Literal["exited", "timeout", "oom", "crashed"]
    detail: str = ""


@dataclass
class _Process:
    job: dict[str, Any]
    deadline: float
    memory: int
    pid: int = 0
    peak: int = 0
    killed: tuple[Literal["timeout", "oom"], str] | None = None
    seconds: float = field(default=0.0)


class Pool:
    """Submits jobs to the fork server and yields what happens. Use as a context manager: leaving it kills what runs."""

    def __init__(self) -> None:
        self._processes: dict[str, _Process] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __len__(self) -> int:
        return len(self._processes)

    def submit(self, job: dict[str, Any], *, seconds: float, memory: int) -> None:
        """Start a job: JSON-able, with `id` and `log`.

        Args:
            job: what `qbench.worker.work` is given.
            seconds: after which its process group is killed; the clock starts when its process does.
            memory: resident bytes of its processes together, beyond which they are killed.
        """
        if self._server is None:
            self._start()
        assert self._server is not None
        assert self._server.stdin is not None
        self._processes[job["id"]] = _Process(job, float("inf"), memory, seconds=seconds)
        with suppress(BrokenPipeError):  # the end of its events tells that the server is gone
            self._server.stdin.write((json.dumps(job) + "\n").encode())
            self._server.stdin.flush()

    def events(self) -> Iterator[dict[str, Any] | Ended]:
        """What has happened since the last call, waiting a moment when nothing has."""
        server = self._server
        if server is None:
            return
        assert server.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(server.stdout, selectors.EVENT_READ)
            ready = selector.select(_TICK)
        if ready:
            received = os.read(server.stdout.fileno(), 1 << 16)
            if not received:
                yield from self._server_died()
                return
            *lines, self._buffer = (self._buffer + received).split(b"\n")
            for line in lines:
                yield from self._handle(json.loads(line))
        self._enforce()

    def _handle(self, event: dict[str, Any]) -> Iterator[dict[str, Any] | Ended]:
        process = self._processes.get(event.get("id", ""))
        if process is None:
            return
        if event["event"] == "started":
            process.pid = event["pid"]
            process.deadline = time.monotonic() + process.seconds
        elif event["event"] == "exit":
            del self._processes[event["id"]]
            yield self._verdict(process, event["code"])
        yield event

    def _verdict(self, process: _Process, code: int) -> Ended:
        name = process.job["id"]
        if process.killed:
            return Ended(name, *process.killed)
        if code == 0:
            return Ended(name, "exited")
        if code == -signal.SIGKILL and process.peak > 0.8 * process.memory:
            return Ended(name, "oom", f"killed by the system at {_gigabytes(process.peak)}")
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Ended(name, "crashed", f"{reason}; its output is in {process.job['log']}")

    def _enforce(self) -> None:
        for process in self._processes.values():
            if not process.pid or process.killed:
                continue
            used = _resident(process.pid)
            process.peak = max(process.peak, used)
            if time.monotonic() > process.deadline:
                process.killed = ("timeout", f"still running after its limit of {process.seconds:g} s")
            elif used > process.memory:
                process.killed = (
                    "oom",
                    f"used {_gigabytes(used)}, more than its limit of {_gigabytes(process.memory)}",
                )
            if process.killed:
                _kill(process.pid)

    def _start(self) -> None:
        environment = os.environ | _SINGLE_THREADED | {"PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "qbench.server"]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._buffer = b""

    def _server_died(self) -> Iterator[Ended]:
        assert self._server is not None
        code = self._server.wait()
        self._server = None
        lost, self._processes = list(self._processes.values()), {}
        for process in lost:
            if process.pid:
                _kill(process.pid)
            yield Ended(process.job["id"], "crashed", f"the fork server exited with code {code}")

    def _stop(self) -> None:
        if self._server is None:
            return
        for process in self._processes.values():
            if process.pid:
                _kill(process.pid)
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server = None


def default_memory(jobs: int) -> int:
    """What is available now, divided by the number of jobs, less a tenth for everything else."""
    return int(psutil.virtual_memory().available * 0.9 / jobs)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def log_path(folder: Path, key: str) -> Path:
    """Where the output of a run goes."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key}.log"


def _resident(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for member in family:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            memory = member.memory_info()
            # Pages shared with the fork server and of memory-mapped images are not this run's own.
            total += memory.rss - getattr(memory, "shared", 0)
    return total


def _kill(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
