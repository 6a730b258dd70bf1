"""The leaderboard: a pure function of the results. Judging (numbers) is here; `markdown.py` writes it for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qbench import training_rows
from qbench.alarms import finer
from qbench.metrics.ap import Matches, paired_interval
from qbench.metrics.ratio import paired_ratio
from qbench.run import Measurement, Result
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
    drop: Interval | None = None
    """Against the float reference, paired; negative is worse."""
    cells: dict[str, Any] = field(default_factory=dict)
    """Judged metrics: `size_mib`, `ratio`, `latency_ratio` ..."""
    notes: dict[str, str] = field(default_factory=dict)
    """Why a metric was not measured."""
    alarms: list[Alarm] = field(default_factory=list)

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


def tables(results: Iterable[Result], outcomes: Callable[[str], Outcomes]) -> list[Table]:
    """Judge the results.

    Args:
        results: of one suite or of several merged.
        outcomes: the outcomes per image of a run, by key.
    """
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        # Results on other images, from other weights or with other calibration images cannot be compared.
        apart = json.dumps([result.identity[part] for part in ("calibration", "dataset", "model")], sort_keys=True)
        groups.setdefault((*result.label.split("/")[:2], apart), []).append(result)
    return [_table(group, outcomes) for _, group in sorted(groups.items())]


def _table(results: list[Result], outcomes: Callable[[str], Outcomes]) -> Table:
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
            row.score = judge.score(scored)
            if reference is not None and row is not reference:
                row.drop = judge.difference(scored, reference.results)
        _cells(row, scored)
    ranked = [row for row in rows if row.score is not None and row is not reference]
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
    rest = [row for row in rows if row.score is None]
    ordered = [*([reference] if reference else []), *ranked, *rest]
    return Table(dataset, model, f"{images} images, seed {seed}", task, ordered, reference)


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

    def difference(self, a: list[Result], b: list[Result]) -> Interval:
        return paired_difference(self._correct(a), self._correct(b))


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

    def difference(self, a: list[Result], b: list[Result]) -> Interval:
        return Interval(*paired_interval(self._matches(a[0]), self._matches(b[0])))


# ------------------------------------------------------------------------------------------------------------- cells


def _cells(row: Row, scored: list[Result]) -> None:
    """Judge the metrics of a row; numbers are averaged over its seeds, ratios pooled."""
    if not scored:
        return
    row.cells["weight_bits"], row.cells["activation_bits"] = (scored[0].bits.get(k) for k in ("weights", "activations"))
    names = dict.fromkeys(name for r in scored for name in r.metrics)
    for name in names:
        measured = [r.metrics[name] for r in scored if name in r.metrics]
        good = [m for m in measured if m.status == "ok"]
        if not good:
            row.notes[name] = _reason(measured[0])
            continue
        plain = name.partition("[")[0]
        judged = _JUDGES[plain]([m.values for m in good]) if plain in _JUDGES else _value(name, good)
        row.cells.update(judged)


def _reason(measurement: Measurement) -> str:
    text = (measurement.error or "").splitlines()
    word = "" if measurement.status == "unsupported" else f"{measurement.status}: "
    return word + (text[0] if text else "no reason given")


def _value(name: str, measured: list[Measurement]) -> dict[str, Any]:
    """A metric that qbench does not know: the mean of its `value`."""
    values = [m.values["value"] for m in measured if isinstance(m.values.get("value"), (int, float))]
    return {f"{name} ({measured[0].unit})": float(np.mean(values))} if values else {}


Values = list[dict[str, Any]]


def _mean(values: Values, key: str) -> float:
    return float(np.mean([v[key] for v in values]))


def _size(values: Values) -> dict[str, Any]:
    file_bytes = _mean(values, "file_bytes")
    return {
        "file_bytes": file_bytes,
        "packed_bytes": _mean(values, "packed_bytes"),
        "nominal_bytes": _mean(values, "nominal_bytes"),
        "compression_ratio": _mean(values, "float_bytes") / file_bytes,
    }


def _coverage(values: Values) -> dict[str, Any]:
    return {
        "weights_covered": _mean(values, "weights_quantized") / _mean(values, "weights_total"),
        "macs_covered": _mean(values, "macs_weights") / _mean(values, "macs_total"),
        "macs_covered_with_inputs": _mean(values, "macs_both") / _mean(values, "macs_total"),
    }


def _cost(values: Values) -> dict[str, Any]:
    return {
        "cost_seconds": _mean(values, "seconds"),
        "cost_peak_memory_bytes": _mean(values, "peak_memory_bytes"),
        "cost_images": _mean(values, "images"),
    }


def _pooled(values: Values, key: str) -> list[float]:
    return [sample for v in values for sample in v[key]]


def _latency(values: Values) -> dict[str, Any]:
    """Median milliseconds, and the paired ratio to float; unstable where float does not even agree with itself."""
    judged: dict[str, Any] = {"float_latency_ms": 1000 * float(np.median(_pooled(values, "float")))}
    if "quantized" in values[0]:
        quantized, reference, again = (_pooled(values, name) for name in ("quantized", "float", "float_again"))
        noise = abs(paired_ratio(again, reference)[0] - 1)
        judged["latency_ms"] = 1000 * float(np.median(quantized))
        judged["latency_ratio"] = Interval(*paired_ratio(quantized, reference))
        judged["latency_ratio_unstable"] = noise > _NOISE
        judged["latency_ratio_saturates"] = any(v.get("saturates", False) for v in values)
        judged["integer_layers"] = f"{values[0]['integer_layers']}/{values[0]['compute_layers']}"
    return judged


_NOISE = 0.05
"""Share by which two instances of the float network may differ before a latency is called unstable."""


def _training_time(values: Values) -> dict[str, Any]:
    """Paired ratio of a training step to a float one, and the reduction it means: negative is slower."""
    quantized, reference = _pooled(values, "quantized"), _pooled(values, "float")
    ratio = Interval(*paired_ratio(quantized, reference))
    seconds = float(np.median(quantized))
    return {
        "step_ratio": ratio,
        "step_seconds": seconds,
        "epoch_seconds": seconds * values[0]["steps_per_epoch"],
        "training_time_reduction_percent": 100 * (1 - ratio.estimate),
        "training_memory_ratio": values[0]["saved_bytes"]["quantized"] / values[0]["saved_bytes"]["float"],
    }


def _energy(values: Values) -> dict[str, Any]:
    from qbench.metrics.energy import millijoules  # here, because it takes torch along

    rounds = [millijoules(v["windows"]) for v in values]
    name = "quantized" if "quantized" in rounds[0] else "float"
    judged: dict[str, Any] = {"energy_mj": float(np.median([e for r in rounds for e in r[name]]))}
    if name == "quantized":
        quantized, reference = ([e for r in rounds for e in r[key]] for key in ("quantized", "float"))
        judged["energy_ratio"] = Interval(*paired_ratio(quantized, reference))
    return judged


_JUDGES: dict[str, Callable[[Values], dict[str, Any]]] = {
    "size": _size,
    "coverage": _coverage,
    "cost": _cost,
    "latency": _latency,
    "training_time": _training_time,
    "energy": _energy,
    # The task's metric is judged with its interval above.
    "top1": lambda _: {},
    "map": lambda values: {key: _mean(values, key) for key in ("AP50", "AP75") if values[0][key] is not None},
}
