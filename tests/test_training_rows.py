"""Trainings beside each other: losses after as many steps and as much time, and what training from scratch takes."""

from typing import Any

import numpy as np
import pytest

from qbench.board import Table, tables
from qbench.markdown import frame, render
from qbench.registry import parse
from qbench.run import Measurement, Result
from qbench.training_rows import compare, loss_at

N = 100


def result(recipe: str, right: int, losses: list[float] | None = None, ratio: float = 1.0, cost: float = 1.0) -> Any:
    """A run that gets the first `right` images right."""
    metrics = {"cost": {"value": cost, "seconds": cost, "peak_memory_bytes": 1, "images": 0}}
    if losses is not None:
        timing = {"quantized": [ratio] * 9, "float": [1.0] * 9, "saved_bytes": {"quantized": 3, "float": 4}}
        metrics["training_time"] = timing | {"steps_per_epoch": 2}
    made = Result(
        key=f"{abs(hash(recipe)):012x}"[:12],
        label=f"data/net/{recipe}/seed=0",
        identity={
            "dataset": ["data", {}, "d0"],
            "model": ["net", {}, "w0"],
            "recipe": [list(parse(step)) for step in recipe.split(" + ")],
            "calibration": [16, 0, "m0"],
            "seed": 0,
        },
        recipe=recipe,
        status="ok",
        phase="done",
        started="2026-01-01T00:00:00+00:00",
        task="classification",
        bits={"weights": None, "activations": None},
        records={} if losses is None else {"training": {"loss": losses}},
        metrics={n: Measurement(status="ok", unit="s", direction="lower", values=v) for n, v in metrics.items()},
    )
    return made, np.arange(N) < right


def judge(*runs: Any) -> Table:
    outcomes = {r.key: {"correct": correct} for r, correct in runs}
    (table,) = tables([r for r, _ in runs], outcomes.__getitem__)
    return table


def cells(table: Table) -> dict[str, dict[str, Any]]:
    return {row.recipe: row.cells for row in table.rows}


def test_the_loss_of_a_step_is_a_mean_over_a_twentieth() -> None:
    losses = [float(i) for i in range(100)]
    assert loss_at(losses, 100) == pytest.approx(np.mean([95, 96, 97, 98, 99]))
    assert loss_at(losses, 1) == 0
    assert loss_at([3.0, 1.0], 2) == 1


def test_slower_trainings_have_done_fewer_steps_in_the_same_time() -> None:
    own, reference = [10.0, 8.0, 6.0, 4.0], [9.0, 7.0, 5.0, 3.0]
    slow = compare(own, reference, 2.0)
    assert (slow["loss_at_equal_steps"], slow["float_loss_at_equal_steps"]) == (4, 3)
    assert (slow["loss_at_equal_time"], slow["float_loss_at_equal_time"]) == (8, 3)
    fast = compare(own, reference, 0.5)
    assert (fast["loss_at_equal_time"], fast["float_loss_at_equal_time"]) == (4, 7)


def test_rows_are_compared_with_float_training_of_as_many_steps_and_the_same_start() -> None:
    found = cells(
        judge(
            result("fp32", 90),
            result("train[start=scratch,steps=4]", 70, [9.0, 9.0, 9.0, 9.0]),
            result("train[steps=2]", 91, [1.0, 1.0]),
            result("train[steps=4]", 91, [4.0, 3.0, 2.0, 1.0]),
            result("train[precision=bf16,steps=4]", 91, [4.0, 3.0, 2.0, 0.9], ratio=0.5),
            result("lsq[steps=4]", 91, [8.0, 6.0, 5.0, 4.0], ratio=2.0),
            result("rtn", 60),
        )
    )
    narrow, quantized = found["train[precision=bf16,steps=4]"], found["lsq[steps=4]"]
    assert (narrow["loss_at_equal_time"], narrow["float_loss_at_equal_time"]) == (0.9, 3)
    assert (quantized["loss_at_equal_time"], quantized["float_loss_at_equal_time"]) == (6, 1)
    assert quantized["training_time_reduction_percent"] == pytest.approx(-100)
    assert quantized["training_memory_ratio"] == 0.75
    assert "loss_at_equal_steps" not in found["train[steps=4]"]
    assert "loss_at_equal_steps" not in found["train[start=scratch,steps=4]"]
    assert "loss_at_equal_steps" not in found["rtn"]


def test_training_from_scratch_to_the_same_accuracy() -> None:
    table = judge(
        result("fp32", 90),
        result("rtn", 60, cost=0.1),
        result("lsq[steps=4]", 85, [1.0] * 4, cost=5.0),
        result("train[start=scratch,steps=4]", 60, [1.0] * 4, cost=20.0),
        result("train[start=scratch,steps=8]", 80, [1.0] * 8, cost=40.0),
    )
    found = cells(table)
    assert found["rtn"]["scratch_seconds"] == 20
    assert found["lsq[steps=4]"]["scratch_seconds"] is None
    assert found["lsq[steps=4]"]["scratch_seconds_tried"] == 40
    assert "scratch_seconds_tried" not in found["train[start=scratch,steps=8]"]
    page = render([table], title="t")
    assert "from scratch s" in page
    assert "| > 40.0" in page
    assert frame([table]).set_index("recipe").loc["rtn", "scratch_seconds"] == 20


def test_boards_without_training_have_none_of_it() -> None:
    page = render([judge(result("fp32", 90), result("rtn", 60))], title="t")
    assert "from scratch" not in page
    assert "loss / float" not in page
