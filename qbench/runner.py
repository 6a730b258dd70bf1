"""Runs what is missing: two lanes of worker processes, and a labelled result for whatever happens to them."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from qbench.machine import exclusive
from qbench.plan import Plan
from qbench.pool import Ended, Pool, cores, default_memory, log_path
from qbench.registry import Reference
from qbench.run import Measurement, Phase, Result, Run, Status, engine, recipe_label
from qbench.store import Store

Redo = Literal["failed", "stale", "all"]


@dataclass
class Todo:
    """What a run still lacks."""

    run: Run
    quantize: bool
    """False when only metrics are missing."""
    metrics: list[Reference]

    def split(self) -> tuple[list[Reference], list[Reference]]:
        """The metrics that may share the machine, and those that need it alone."""
        alone = [m for m in self.metrics if m.plugin.attributes["exclusive"]]
        return [m for m in self.metrics if m not in alone], alone


def outstanding(plan: Plan, results: dict[str, Result], artifacts: Path, redo: Redo | None = None) -> list[Todo]:
    """What is left to do, in the plan's order.

    Args:
        plan: of the suite.
        results: that are there, by key.
        artifacts: folder of the cached artifacts; without its artifact a run is done again for a new metric.
        redo: also do again what failed, what another version of qbench's engine made, or all.
    """
    todo = []
    for run in plan.runs:
        wanted = plan.metrics_of(run)
        result = results.get(run.key)
        if result is None or _again(result, redo):
            todo.append(Todo(run, True, wanted))
        elif result.status == "ok":
            failed = {name for name, m in result.metrics.items() if m.status not in ("ok", "unsupported")}
            missing = [m for m in wanted if str(m) not in result.metrics or (redo == "failed" and str(m) in failed)]
            if missing:
                cached = (artifacts / f"{run.key}.safetensors").is_file()
                todo.append(Todo(run, not cached, missing if cached else wanted))
    return todo


def _again(result: Result, redo: Redo | None) -> bool:
    if redo == "failed":
        return result.status not in ("ok", "unsupported")
    if redo == "stale":
        return result.provenance.get("engine") != engine()
    return redo == "all"


class Reporter(Protocol):
    """Who is told what happens."""

    def begin(self, jobs: int) -> None: ...
    def event(self, run: Run, event: dict[str, Any]) -> None: ...
    def finished(self, run: Run, result: Result, what: str, seconds: float, left: int) -> None: ...
    def message(self, text: str) -> None: ...


@dataclass
class _Work:
    """A job on its way: which part of a run is being done, and how far it is."""

    todo: Todo
    metrics: list[Reference]
    quantize: bool
    phase: Phase = "start"
    metric: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def title(self) -> str:
        """What is being done, for the display."""
        return "scored" if self.quantize else ", ".join(m.name for m in self.metrics)


class Runner:
    """Executes the outstanding runs of a plan."""

    def __init__(self, plan: Plan, store: Store, cache: Path, reporter: Reporter, jobs: int | None = None) -> None:
        self.plan, self.store, self.cache, self.reporter = plan, store, cache, reporter
        self.jobs = jobs or plan.suite.jobs or max(1, cores() // 2)
        self.memory = plan.suite.limits.memory or default_memory(self.jobs)
        self.left = 0

    def execute(self, todo: list[Todo]) -> None:
        """Do the work until none is left. KeyboardInterrupt kills what runs; the results on disk stay whole."""
        shared: deque[_Work] = deque()
        alone: deque[_Work] = deque()
        for item in todo:
            together, exclusively = item.split()
            if item.quantize or together:
                shared.append(_Work(item, together, item.quantize))
            if exclusively:
                alone.append(_Work(item, exclusively, False))
        self.left = len(shared) + len(alone)
        self.reporter.begin(self.left)
        with Pool() as pool:
            self._lane(pool, shared, self.jobs)
            if alone:
                with exclusive(lambda holder: self.reporter.message(f"waiting for the machine: {holder}")):
                    self._lane(pool, alone, 1)

    def _lane(self, pool: Pool, queue: deque[_Work], jobs: int) -> None:
        """Work through a queue, `jobs` at a time."""
        running: dict[str, _Work] = {}
        while queue or running:
            while queue and len(running) < jobs:
                work = queue.popleft()
                key = work.todo.run.key
                result = self.store.read(key)
                if not work.quantize and (result is None or result.status != "ok"):
                    self.left -= 1  # a run that failed has been told of, and has nothing to measure
                    continue
                running[key] = work
                self._submit(pool, work, jobs)
            for event in pool.events():
                if isinstance(event, Ended):
                    work = running.pop(event.id)
                    again = self._ended(work, event)
                    if again is not None:
                        queue.appendleft(again)
                        continue
                    result = self.store.read(event.id)
                    assert result is not None
                    self.left -= 1
                    self.reporter.finished(work.todo.run, result, work.title, time.monotonic() - work.began, self.left)
                elif event["event"] == "progress":
                    work = running[event["id"]]
                    work.phase, work.metric = event.get("phase", work.phase), event.get("metric", work.metric)
                    self.reporter.event(work.todo.run, event)

    def _submit(self, pool: Pool, work: _Work, jobs: int) -> None:
        run = work.todo.run
        log = log_path(self.cache / "logs", run.key)
        if work.quantize:
            log.unlink(missing_ok=True)
        work.phase, work.began = "start", time.monotonic()
        job = {
            "id": run.key,
            "log": str(log),
            "identity": run.identity,
            "label": run.label,
            "recipe": recipe_label(run.recipe),
            "quantize": work.quantize,
            "metrics": {str(m): [m.name, dict(m.options)] for m in work.metrics},
            "plugins": list(self.plan.plugins),
            "results": str(self.store.folder),
            "cache": str(self.cache),
            "jobs": jobs,
            "threads": max(1, cores() // jobs),
            "memory": self.memory,
        }
        pool.submit(job, seconds=self.plan.suite.limits.time, memory=self.memory)

    def _ended(self, work: _Work, ended: Ended) -> _Work | None:
        """Write down how it ended; returns what is left to do of it after a metric brought its process down."""
        if ended.how == "exited":
            return None
        run = work.todo.run
        result = None if work.quantize and work.phase != "measure" else self.store.read(run.key)
        if result is None or result.status != "ok":
            self.store.write(_failure(run, ended.how, work.phase, ended.detail))
            return None
        lost = next((m for m in work.metrics if str(m) == work.metric), work.metrics[0] if work.metrics else None)
        if lost is None:
            return None
        result.metrics[str(lost)] = Measurement(
            status=ended.how,
            unit=lost.plugin.attributes["unit"],
            direction=lost.plugin.attributes["direction"],
            error=ended.detail,
        )
        self.store.write(result)
        rest = [m for m in work.metrics if str(m) not in result.metrics]
        return _Work(work.todo, rest, False) if rest else None


def _failure(run: Run, status: Status, phase: Phase, error: str) -> Result:
    return Result(
        key=run.key,
        label=run.label,
        identity=run.identity,
        recipe=recipe_label(run.recipe),
        status=status,
        phase=phase,
        error=error,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance={"engine": engine()},
    )


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """Only one `qbench run` writes to a results folder at a time.

    Raises:
        UserError: another one does.
    """
    import fcntl

    from qbench.errors import UserError

    with (store.folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip() or "unknown"
            raise UserError(
                f"{store.folder}: another qbench run (process {other}) is writing here; wait for it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
