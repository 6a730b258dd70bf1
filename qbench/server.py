"""The warm fork server: imports torch once, then forks one process for each run.

It reads jobs as JSON lines from its standard input and writes events as JSON lines to its standard output. Every run is
the leader of its own process group. When the standard input ends (the parent has exited, however it did), all runs are
killed, so that no orphan is left; when the server itself is killed, the kernel kills the runs.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import selectors
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any

from qbench import registry

_PR_SET_PDEATHSIG = 1
_EVENTS = 3
"""File descriptor of the events, in the server and in the runs; standard output belongs to whoever prints."""


def emit(event: dict[str, Any]) -> None:
    """Write one event; one short write to a pipe, so that events of several processes do not mix."""
    os.write(_EVENTS, (json.dumps(event) + "\n").encode())


def main() -> None:
    """Serve until standard input ends."""
    os.dup2(1, _EVENTS)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal: the parent decides
    wake, woken = os.pipe()
    for descriptor in (wake, woken):
        os.set_blocking(descriptor, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    _warm_up()
    emit({"event": "ready"})
    jobs: dict[int, str] = {}
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake, selectors.EVENT_READ)
    pending = b""
    while True:
        for key, _ in selector.select():
            if key.fd == wake:
                with suppress(BlockingIOError):
                    os.read(wake, 4096)
                _reap(jobs)
                continue
            received = os.read(0, 1 << 16)
            if not received:
                _kill_all(jobs)
                return
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                job = json.loads(line)
                jobs[_fork(job)] = job["id"]


def _warm_up() -> None:
    """Import what runs will need, the built-in plugins above all, so that no run spends seconds on importing."""
    importlib.import_module("qbench.worker")
    for kind in registry.KINDS:
        for plugin in registry.index(kind).values():
            if plugin.module is not None:
                importlib.import_module(plugin.module)


def _fork(job: dict[str, Any]) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        _run(job, server)
    with suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)  # here and in the run, whichever comes first: it can be killed as a group at once
    emit({"event": "started", "id": job["id"], "pid": pid})
    return pid


def _run(job: dict[str, Any], server: int) -> None:
    """In the forked process: become a session of its own, log to a file, do the job, and exit."""
    code = 1
    try:
        with suppress(PermissionError):
            os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        for name in (signal.SIGINT, signal.SIGCHLD):
            signal.signal(name, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from qbench import worker

        worker.work(job, lambda **fields: emit({"event": "progress", "id": job["id"], **fields}))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _reap(jobs: dict[int, str]) -> None:
    """Report the runs that ended, and kill what their process groups left behind."""
    while jobs:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in jobs:
            _kill(pid)
            emit({"event": "exit", "id": jobs.pop(pid), "code": os.waitstatus_to_exitcode(status)})


def _kill_all(jobs: dict[int, str]) -> None:
    for pid in jobs:
        _kill(pid)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
