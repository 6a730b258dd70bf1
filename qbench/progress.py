"""Telling a person, a log file or a program how a suite is going."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from qbench.run import Result, Run


def headline(result: Result) -> str:
    """The one line that a result deserves when it is done."""
    if result.status != "ok":
        return f"{result.status} in {result.phase}: {(result.error or '').splitlines()[0] if result.error else ''}"
    failed = [f"{name} {m.status}" for name, m in result.metrics.items() if m.status not in ("ok", "unsupported")]
    return ", ".join(["ok", *failed])


class Plain:
    """One line for each run that ends: for logs and pipes."""

    def begin(self, jobs: int) -> None:
        self.jobs, self.start = jobs, time.monotonic()

    def event(self, run: Run, event: dict[str, Any]) -> None:
        pass

    def finished(self, run: Run, result: Result, what: str, seconds: float, left: int) -> None:
        done = self.jobs - left
        eta = self._eta(done, left)
        self.message(f"[{done}/{self.jobs}] {run.label}: {what}: {headline(result)} ({seconds:.1f} s{eta})")

    def _eta(self, done: int, left: int) -> str:
        return f", about {duration((time.monotonic() - self.start) / done * left)} left" if left and done else ""

    def message(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class Json:
    """One JSON object a line, for programs."""

    def begin(self, jobs: int) -> None:
        self._print({"event": "begin", "jobs": jobs})

    def event(self, run: Run, event: dict[str, Any]) -> None:
        self._print(
            {"event": "progress", "key": run.key, **{k: v for k, v in event.items() if k not in ("event", "id")}}
        )

    def finished(self, run: Run, result: Result, what: str, seconds: float, left: int) -> None:
        fields = {"key": run.key, "label": run.label, "what": what, "seconds": seconds, "left": left}
        state = {"status": result.status, "phase": result.phase, "error": result.error}
        self._print({"event": "finished", **fields, **state})

    def message(self, text: str) -> None:
        self._print({"event": "message", "text": text})

    def close(self) -> None:
        pass

    def _print(self, fields: dict[str, Any]) -> None:
        print(json.dumps(fields), flush=True)


class Live(Plain):
    """A bar for the suite and a line for each run under way; runs that end scroll by above."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        self._display = Progress(*columns, TextColumn("[dim]{task.fields[note]}"), console=console, transient=True)
        self._runs: dict[str, TaskID] = {}

    def begin(self, jobs: int) -> None:
        super().begin(jobs)
        self._display.start()
        self._suite = self._display.add_task("[bold]suite", total=jobs, note="")

    def event(self, run: Run, event: dict[str, Any]) -> None:
        if run.key not in self._runs:
            short = run.label if len(run.label) < 70 else "…" + run.label[-69:]
            self._runs[run.key] = self._display.add_task(short.replace("[", r"\["), total=100, note="")
        note = event.get("metric") or event.get("phase")
        done = event.get("fraction")
        self._display.update(
            self._runs[run.key],
            completed=0 if note else None if done is None else 100 * done,
            **({"note": note} if note else {}),
        )

    def finished(self, run: Run, result: Result, what: str, seconds: float, left: int) -> None:
        if run.key in self._runs:
            self._display.remove_task(self._runs.pop(run.key))
        super().finished(run, result, what, seconds, left)
        done = self.jobs - left
        self._display.update(self._suite, completed=done, note=self._eta(done, left).strip(", "))

    def message(self, text: str) -> None:
        self._display.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._display.stop()


def reporter(*, as_json: bool) -> Plain | Json | Live:
    """The reporter for where standard output goes."""
    if as_json:
        return Json()
    return Live(Console()) if sys.stdout.isatty() else Plain()


def duration(seconds: float) -> str:
    """`45 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
