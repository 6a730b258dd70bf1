"""The leaderboard: a pure function of the results. Judging (numbers) is here; `markdown.py` writes it for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qbench import profiles, training_rows
from qbench.alarms import finer
from qbench.deployed import judge_deployed, judge_timed
from qbench.judges import judge_metrics
from qbench.metrics.ap import Matches, average_precision, interval, paired_interval
from qbench.profiles import Profile
from qbench.run import Result
from qbench.stats import Interval, paired_difference, ranks

Outcomes = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Alarm:
    """A row that is significantly worse than one that it should be better than."""

    how: str
    """It is finer: "more bits", for example."""
    other: Row
    difference: Interval
    """Paired; negative."""


@dataclass
class Row:
    """One recipe on one model: the judgement of its results over all seeds."""

    recipe: str
    results: list[Result]
    rank: str = ""
    score: float | None = None
    """Mean over seeds of the task's metric, as a share."""
    spread: Interval | None = None
    """Of the score, where it is no mean over images."""
    drop: Interval | None = None
    """Against the float reference, paired; negative is worse."""
    cells: dict[str, Any] = field(default_factory=dict)
    """Judged metrics: `size_mib`, `ratio`, `latency_ratio` ..."""
    notes: dict[str, str] = field(default_factory=dict)
    """Why a metric was not measured."""
    alarms: list[Alarm] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What else is wrong with it, in words."""
    outside: list[str] = field(default_factory=list)
    """Why it is not ranked under the profile of the board."""

    @property
    def key(self) -> str:
        return self.results[0].key

    @property
    def status(self) -> str:
        bad = [r for r in self.results if r.status != "ok"]
        return f"{bad[0].status} in {bad[0].phase}" if bad else "ok"


@dataclass
class Table:
    """All recipes of one model on one dataset with the same calibration images, best first."""

    dataset: str
    model: str
    calibration: str
    task: str
    rows: list[Row]
    reference: Row | None
    level: float = 0.95


def tables(results: Iterable[Result], outcomes: Callable[[str], Outcomes], profile: str | None = None) -> list[Table]:
    """Judge the results.

    Args:
        results: of one suite or of several merged.
        outcomes: the outcomes per image of a run, by key.
        profile: of hardware; only what it can execute is ranked.

    Raises:
        UserError: the profile is unknown.
    """
    hardware = None if profile is None else profiles.load(profile)
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        # Results on other images, from other weights or with other calibration images cannot be compared.
        apart = json.dumps([result.identity[part] for part in ("calibration", "dataset", "model")], sort_keys=True)
        groups.setdefault((*result.label.split("/")[:2], apart), []).append(result)
    return [_table(group, outcomes, hardware) for _, group in sorted(groups.items())]


def _table(results: list[Result], outcomes: Callable[[str], Outcomes], hardware: Profile | None) -> Table:
    dataset, model = results[0].label.split("/")[:2]
    images, seed, _ = results[0].identity["calibration"]
    by_recipe: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: (r.identity["seed"], r.started)):
        by_recipe.setdefault(result.recipe, []).append(result)
    rows = [Row(recipe, group) for recipe, group in by_recipe.items()]
    task = next((r.task for r in results if r.task), "classification")
    judge = _Detection(outcomes) if task == "detection" else _Classification(outcomes)
    reference = next((row for row in rows if row.recipe == "fp32" and row.status == "ok"), None)
    for row in rows:
        scored = [r for r in row.results if r.status == "ok"]
        if scored:
            row.score, row.spread = judge.score(scored), judge.spread(scored)
            if reference is not None and row is not reference:
                row.drop = judge.difference(scored, reference.results)
            row.cells, row.notes = judge_metrics(scored)
            row.warnings = judge_timed(scored[0])
            deployed = judge_deployed(scored[0], outcomes, judge.compare)
            if deployed is not None:
                row.cells |= deployed.cells
                row.warnings += deployed.warnings
            if hardware is not None and row is not reference:
                row.outside = _outside(hardware, scored[0])
    ranked = [row for row in rows if row.score is not None and row is not reference and not row.outside]
    ranked.sort(key=lambda row: -(row.score or 0))

    def difference(a: Row, b: Row) -> Interval:
        return judge.difference(*([r for r in row.results if r.status == "ok"] for row in (a, b)))

    def beats(i: int, j: int) -> bool:
        return difference(ranked[i], ranked[j]).excludes_zero

    for row, rank in zip(ranked, ranks([row.score or 0.0 for row in ranked], beats), strict=True):
        row.rank = rank
    for row in ranked:
        row.alarms = _alarms(row, ranked, difference)
    training_rows.judge(rows)
    rest = [row for row in rows if (row.score is None or row.outside) and row is not reference]
    ordered = [*([reference] if reference else []), *ranked, *rest]
    return Table(dataset, model, f"{images} images, seed {seed}", task, ordered, reference)


def _outside(hardware: Profile, result: Result) -> list[str]:
    measured = result.metrics.get("placement")
    if measured is None or measured.status != "ok":
        return ["the suite lacks the metric placement"]
    return profiles.violations(hardware, measured.values)


def _alarms(row: Row, others: list[Row], difference: Callable[[Row, Row], Interval]) -> list[Alarm]:
    found = []
    for other in others:
        how = finer(*(r.results[0].identity["recipe"] for r in (row, other)))
        if how is not None and (worse := difference(row, other)).high < 0:
            found.append(Alarm(how, other, worse))
    return found


class _Classification:
    """Share of images whose first guess is right; intervals over images, seeds averaged per image."""

    def __init__(self, outcomes: Callable[[str], Outcomes]) -> None:
        self._outcomes = outcomes
        self._known: dict[str, np.ndarray] = {}

    def _correct(self, results: list[Result]) -> np.ndarray:
        for r in results:
            if r.key not in self._known:
                self._known[r.key] = self._outcomes(r.key)["correct"].astype(float)
        return np.mean([self._known[r.key] for r in results], axis=0)

    def score(self, results: list[Result]) -> float:
        return float(self._correct(results).mean())

    def spread(self, _: list[Result]) -> Interval | None:
        return None

    def difference(self, a: list[Result], b: list[Result]) -> Interval:
        return paired_difference(self._correct(a), self._correct(b))

    @staticmethod
    def compare(a: Outcomes, b: Outcomes) -> tuple[float, Interval]:
        """The score of `a`, and its difference to `b` of the same images."""
        return float(a["correct"].mean()), paired_difference(a["correct"], b["correct"])


class _Detection:
    """COCO AP; intervals by a paired bootstrap over images. Of several seeds the first is compared."""

    def __init__(self, outcomes: Callable[[str], Outcomes]) -> None:
        self._outcomes = outcomes
        self._known: dict[str, Matches] = {}

    def _matches(self, result: Result) -> Matches:
        if result.key not in self._known:
            self._known[result.key] = Matches.from_arrays(self._outcomes(result.key))
        return self._known[result.key]

    def score(self, results: list[Result]) -> float:
        return float(np.mean([r.metrics["map"].values["AP"] for r in results]))

    def spread(self, results: list[Result]) -> Interval | None:
        return Interval(*interval(self._matches(results[0])))

    def difference(self, a: list[Result], b: list[Result]) -> Interval:
        return Interval(*paired_interval(self._matches(a[0]), self._matches(b[0])))

    @staticmethod
    def compare(a: Outcomes, b: Outcomes) -> tuple[float, Interval]:
        """The AP of `a`, and its difference to `b` of the same images."""
        left, right = Matches.from_arrays(a), Matches.from_arrays(b)
        return average_precision(left), Interval(*paired_interval(left, right))
