"""Rows that train beside each other: losses after as many steps and as much time, and training from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qbench.run import Result

if TYPE_CHECKING:
    from qbench.board import Row

_SHARE = 20
"""The loss of a step is the mean of it and those before, over one in so many of all."""


def judge(rows: Sequence[Row]) -> None:
    """Fill in the cells of all rows that another row gives a meaning.

    A row that trains is compared with the row whose only step is `train` in float32, with the same start and as many
    steps. `scratch_seconds` is what the quickest row took that trained from scratch to at least the row's score, and
    `scratch_seconds_tried` the longest.
    """
    floats = [row for row in rows if row.status == "ok" and _plain(row) is not None]
    for row in rows:
        losses = _losses(row)
        reference = next((r for r in floats if r is not row and _comparable(r, row)), None)
        if losses and reference is not None and "step_ratio" in row.cells:
            ratio = row.cells["step_ratio"].estimate
            pairs = [compare(own, other, ratio) for own, other in zip(losses, _losses(reference), strict=False)]
            row.cells |= {key: float(np.mean([pair[key] for pair in pairs])) for key in pairs[0]}
    _from_scratch(rows, [row for row in floats if _start(row) == "scratch" and "cost_seconds" in row.cells])


def compare(own: Sequence[float], reference: Sequence[float], ratio: float) -> dict[str, float]:
    """The losses of two trainings after as many steps, and after as much time.

    Args:
        own: losses of each step.
        reference: those of the other training.
        ratio: time of an own step as a share of one of the other, measured side by side.
    """
    steps = min(len(own), len(reference))
    time = min(len(own) * ratio, len(reference))  # in steps of the reference
    return {
        "loss_at_equal_steps": loss_at(own, steps),
        "float_loss_at_equal_steps": loss_at(reference, steps),
        "loss_at_equal_time": loss_at(own, max(1, int(time / ratio))),
        "float_loss_at_equal_time": loss_at(reference, max(1, int(time))),
    }


def loss_at(losses: Sequence[float], step: int) -> float:
    """The loss after so many steps."""
    window = max(1, len(losses) // _SHARE)
    return float(np.mean(losses[max(0, step - window) : step]))


def _from_scratch(rows: Sequence[Row], scratch: Sequence[Row]) -> None:
    for row in rows:
        if scratch and row not in scratch and row.score is not None:
            enough = [r.cells["cost_seconds"] for r in scratch if (r.score or 0) >= row.score]
            row.cells["scratch_seconds"] = min(enough) if enough else None
            row.cells["scratch_seconds_tried"] = max(r.cells["cost_seconds"] for r in scratch)


def _comparable(reference: Row, row: Row) -> bool:
    own, other = _losses(row), _losses(reference)
    return bool(own) and bool(other) and len(own[0]) == len(other[0]) and _start(reference) == _start(row)


def _losses(row: Row) -> list[list[float]]:
    """Of each step, for each seed."""
    return [r.records["training"]["loss"] for r in row.results if r.status == "ok" and "training" in r.records]


def _plain(row: Row) -> dict[str, Any] | None:
    """The options of a row that only trains, in float32."""
    recipe = _recipe(row.results[0])
    if [name for name, _ in recipe] != ["train"] or recipe[0][1].get("precision", "float32") != "float32":
        return None
    return recipe[0][1]


def _start(row: Row) -> str:
    options: dict[str, Any] = dict(_recipe(row.results[0])).get("train", {})
    return str(options.get("start", "given"))


def _recipe(result: Result) -> list[tuple[str, dict[str, Any]]]:
    return [(name, options) for name, options in result.identity["recipe"]]
