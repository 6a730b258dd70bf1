"""What each command does, once its arguments are known."""

from __future__ import annotations

import json
import signal
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qbench import plan as planning
from qbench import preflight, registry
from qbench.board import tables
from qbench.cache import cache_dir
from qbench.errors import UserError
from qbench.markdown import publish
from qbench.plan import Plan
from qbench.progress import duration, headline, reporter
from qbench.run import Result
from qbench.runner import Redo, Runner, Todo, locked, outstanding
from qbench.store import Store
from qbench.suite import load


def _plan(suite: Path, plugins: list[str], settings: list[str], only: str | None) -> Plan:
    loaded, source = load(suite, settings, plugins)
    return planning.make(loaded, source, plugins, only)


def run(
    suite: Path,
    results: Path,
    *,
    plugins: list[str],
    settings: list[str],
    only: str | None,
    dry_run: bool,
    redo: str | None,
    jobs: int | None,
    as_json: bool,
) -> int:
    """Run what is missing; returns the exit code: 0, or 1 when a run failed, or 130 when stopped."""
    if redo is not None and redo not in typing.get_args(Redo):
        raise UserError(f"--redo {redo!r}: write failed, stale or all")
    plan = _plan(suite, plugins, settings, only)
    store = Store(results / plan.suite.name)
    if dry_run:
        _show_plan(plan, store, redo, as_json=as_json)
        return 0
    store.check_writable()
    report = reporter(as_json=as_json)
    todo = _todo(plan, store.read_all()[0], redo)
    preflight.check((t.run for t in todo), cache_dir(), report.message)
    store.folder.mkdir(parents=True, exist_ok=True)
    with locked(store):
        for line in store.tidy():
            report.message(line)
        todo = _todo(plan, store.read_all()[0], redo)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            if todo:
                Runner(plan, store, cache_dir(), report, jobs).execute(todo)
        except KeyboardInterrupt:
            report.close()
            report.message("stopped; run the same command to go on from here")
            return 130
        finally:
            report.close()
        return _conclude(plan, store, done=len(todo), as_json=as_json)


def _todo(plan: Plan, known: dict[str, Result], redo: str | None = None) -> list[Todo]:
    return outstanding(plan, known, cache_dir() / "artifacts", typing.cast("Redo | None", redo))


def _conclude(plan: Plan, store: Store, *, done: int, as_json: bool) -> int:
    """Write the board, say where it is, and which runs failed."""
    known, _ = store.read_all()
    mine = [known[r.key] for r in plan.runs if r.key in known]
    failed = [r for r in mine if headline(r) != "ok" and r.status != "unsupported"]
    written = publish(
        tables(mine, store.outcomes), store.folder, title=plan.suite.name, description=plan.suite.description
    )
    if as_json:
        print(json.dumps({"event": "end", "runs": len(mine), "done": done, "failed": [r.key for r in failed]}))
        return 1 if failed else 0
    for result in failed:
        print(f"{result.key} {result.label}: {headline(result)}")
    print(f"{len(mine)} runs, {done} done now, {len(failed)} failed; leaderboard: {written}")
    return 1 if failed else 0


def _show_plan(plan: Plan, store: Store, redo: str | None, *, as_json: bool) -> None:
    known, damaged = store.read_all()
    todo = {t.run.key: t for t in _todo(plan, known, redo)}
    estimate = _estimate(todo.values(), known)
    if as_json:
        runs = [{"key": r.key, "label": r.label, "todo": _what(todo.get(r.key))} for r in plan.runs]
        print(json.dumps({"runs": runs, "estimated_seconds": estimate, "damaged": damaged}, indent=1))
        return
    for r in plan.runs:
        print(f"{r.key}  {_what(todo.get(r.key)):<10}  {r.label}")
    for line in damaged:
        print(line)
    expected = f"about {duration(estimate)}" if estimate is not None else "not known yet"
    print(f"{len(plan.runs)} runs: {len(plan.runs) - len(todo)} done, {len(todo)} to do; estimated time: {expected}")


def _what(todo: Todo | None) -> str:
    return "done" if todo is None else "run" if todo.quantize else "metrics"


def _estimate(todo: Iterable[Todo], known: dict[str, Result]) -> float | None:
    """Seconds, from earlier results of the same cells, else of the same recipe; None when some were never seen."""
    seen: dict[str, float] = {}
    for result in known.values():
        took = sum(result.seconds.values()) + sum(m.seconds or 0 for m in result.metrics.values())
        seen[result.label] = seen[result.recipe] = took
    seconds = [seen.get(t.run.label, seen.get(t.run.label.split("/")[2])) for t in todo]
    return None if None in seconds else sum(s for s in seconds if s is not None)


def status(
    suite: Path, results: Path, *, plugins: list[str], settings: list[str], only: str | None, as_json: bool
) -> None:
    """Print one line for each run of the suite."""
    plan = _plan(suite, plugins, settings, only)
    store = Store(results / plan.suite.name)
    known, damaged = store.read_all()
    todo = {t.run.key: t for t in _todo(plan, known)}
    stale = {t.run.key for t in _todo(plan, known, "stale")} - todo.keys()
    lines = []
    for r in plan.runs:
        result = known.get(r.key)
        state = "missing" if result is None else headline(result)
        if result is not None and r.key in todo:
            state += ", metrics missing"
        lines.append({"key": r.key, "label": r.label, "state": state, "stale": r.key in stale})
    if as_json:
        print(json.dumps({"runs": lines, "damaged": damaged}, indent=1))
        return
    for line in lines:
        print(f"{line['key']}  {line['label']}: {line['state']}{' (stale)' if line['stale'] else ''}")
    for text in damaged:
        print(text)
    print(f"{len(lines)} runs, {len(todo)} to do, {len(stale)} stale")


def check(name: str, plugins: list[str], *, as_json: bool) -> int:
    """Run the conformance kit on one method; returns 1 when it breaks a promise."""
    from qbench.check import check_method

    registry.load_plugins(plugins)
    reference = registry.resolve("method", *registry.parse(name))
    checks = list(check_method(reference))
    if as_json:
        print(json.dumps([{"name": c.name, "ok": c.ok, "detail": c.detail} for c in checks], indent=1))
    else:
        for c in checks:
            print(f"{'ok  ' if c.ok else 'FAIL'}  {c.name}{': ' + c.detail if c.detail else ''}")
    return 0 if all(c.ok for c in checks) else 1


def pictures(key: str, results: Path, folder: Path, *, plugins: list[str]) -> None:
    """Write the contact sheet of a detection run into the folder."""
    from qbench.pictures import pictures as write

    registry.load_plugins(plugins)
    write(key, results, folder / f"{key}.png")


def train(
    model: str,
    dataset: str,
    out: Path,
    *,
    plugins: list[str],
    settings: list[str],
    start: str | None,
    seed: int,
    **options: Any,
) -> None:
    """Train a float checkpoint, and print how good it is."""
    from pydantic import ValidationError

    from qbench.train import FROM_SCRATCH
    from qbench.train import train as train_checkpoint

    registry.load_plugins(plugins)
    references = (
        registry.resolve("model", *registry.parse(model)),
        registry.resolve("dataset", *registry.parse(dataset)),
    )
    _, given = registry.parse(f"train[{','.join(settings)}]", "--set")
    try:
        schedule = FROM_SCRATCH.model_validate(FROM_SCRATCH.model_dump() | options | given)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(type(FROM_SCRATCH).model_fields)
        raise UserError(f"--set {first['loc'][0]}: {first['msg'].lower()} (options: {known})") from None
    report = train_checkpoint(*references, out, schedule=schedule, start=start, seed=seed)
    if start is not None:
        print(f"not taken from {start}: {', '.join(report['training']['start']['new']) or 'nothing'}")
    print(f"{out}: {', '.join(f'{name} {value}' for name, value in report['evaluation'].items())}")
