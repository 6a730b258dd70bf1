"""From a suite to its runs: pure, but for looking at what the datasets and weights are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qbench import registry
from qbench.datasets import base as datasets
from qbench.datasets.base import Dataset
from qbench.errors import UserError
from qbench.models.base import Model
from qbench.registry import Reference
from qbench.run import Run
from qbench.suite import Recipe, Source, Suite, Task, recipes, references

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a suite asks for."""

    suite: Suite
    runs: tuple[Run, ...]
    metrics: tuple[Reference, ...]
    plugins: tuple[str, ...]
    """Plugin files, absolute: worker processes import them too."""
    tasks: dict[str, str]
    """Task of each run by key."""

    def metrics_of(self, run: Run) -> list[Reference]:
        """The metrics that apply to the run's task."""
        task = self.tasks[run.key]
        return [m for m in self.metrics if m.plugin.attributes["task"] in (None, task)]


def make(suite: Suite, source: Source, plugins: list[str], only: str | None = None) -> Plan:
    """Expand the matrix: tasks x models x recipes x seeds, with the float reference of every model.

    Args:
        suite: as loaded.
        source: of its error messages.
        plugins: plugin files given on the command line, besides the suite's.
        only: keep the runs whose label contains this text, and their references.

    Raises:
        UserError: anything is unknown, missing, or does not fit together.
    """
    metrics = [
        ref for i, raw in enumerate(suite.metrics) for ref in references("metric", raw, source.where(("metrics", i)))
    ]
    # Everything that is written is checked before anything is looked up on disk.
    parsed = [_task(task, i, suite, source) for i, task in enumerate(suite.tasks)]
    runs: dict[str, Run] = {}
    tasks: dict[str, str] = {}
    for i, (task, (dataset_reference, models, task_recipes)) in enumerate(zip(suite.tasks, parsed, strict=True)):
        dataset = _made(dataset_reference, Dataset)
        _, manifest = datasets.draw(
            dataset, task.calibration.images, task.calibration.seed, source.where(("tasks", i, "calibration")) + ": "
        )
        specs = [_made(model, Model) for model in models]
        names = [spec.name for spec in specs]
        for model, spec in zip(models, specs, strict=True):
            title = spec.name if names.count(spec.name) == 1 else ""
            if spec.task != dataset.task:
                where = source.where(("tasks", i, "models"))
                raise UserError(f"{where}: {model} is for {spec.task}, but {dataset_reference} is for {dataset.task}")
            weights = spec.weights.fingerprint()
            calibration = (task.calibration.images, task.calibration.seed)
            cells = [(recipe, seed) for recipe in task_recipes for seed in suite.seeds]
            reference = (registry.resolve("method", "fp32"),)
            for recipe, seed in [(reference, suite.seeds[0]), *cells]:
                run = Run(
                    dataset_reference,
                    dataset.fingerprint,
                    model,
                    weights,
                    recipe,
                    seed,
                    calibration,
                    manifest.hash,
                    title,
                )
                if not run.is_reference or seed == suite.seeds[0]:
                    runs[run.key], tasks[run.key] = run, dataset.task
    chosen = _select(list(runs.values()), only)
    files = [str((source.path.parent / p).resolve()) for p in suite.plugins] + [str(Path(p).resolve()) for p in plugins]
    return Plan(suite, tuple(chosen), tuple(metrics), tuple(files), tasks)


def _made(reference: Reference, kind: type[T]) -> T:
    """What a dataset or model plugin returns.

    Raises:
        UserError: it is not what such a plugin must return.
    """
    made = reference()
    if not isinstance(made, kind):
        wanted = f"qbench.{kind.__name__}"
        raise UserError(f"{reference.kind} {reference.name!r} returned {type(made).__name__}, not a {wanted}")
    return made


def _task(task: Task, i: int, suite: Suite, source: Source) -> tuple[Reference, list[Reference], list[Recipe]]:
    place = ("tasks", i)
    found = references("dataset", task.dataset, source.where((*place, "dataset")))
    if len(found) > 1:
        raise UserError(f"{source.where((*place, 'dataset'))}: one dataset a task; write another task for the other")
    models = [
        m for j, raw in enumerate(task.models) for m in references("model", raw, source.where((*place, "models", j)))
    ]
    at: tuple[str | int, ...] = ("recipes",) if task.recipes is None else (*place, "recipes")
    written = suite.recipes if task.recipes is None else task.recipes
    if not written:
        raise UserError(f"{source.where(at)}: no recipes; list at least one, for example `recipes: [rtn]`")
    return found[0], models, [r for j, raw in enumerate(written) for r in recipes(raw, source.where((*at, j)))]


def _select(runs: list[Run], only: str | None) -> list[Run]:
    if only is None:
        return runs
    kept = [run for run in runs if only in run.label]
    if not kept:
        raise UserError(f"-k {only!r} matches none of the {len(runs)} runs; `--dry-run` without -k shows their names")
    models = {(str(run.dataset), str(run.model)) for run in kept}
    keys = {run.key for run in kept}
    return [r for r in runs if r.key in keys or (r.is_reference and (str(r.dataset), str(r.model)) in models)]
