"""The board is a pure function of the results: ties, drops, failures, seeds, and reasons for what is missing."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qbench.board import tables
from qbench.markdown import frame, publish, render
from qbench.registry import parse
from qbench.run import Measurement, Result, Status

N = 400


def result(
    recipe: str, right: int, *, seed: int = 0, status: Status = "ok", **metrics: Any
) -> tuple[Result, np.ndarray]:
    """A run that gets the first `right` images right."""
    made = Result(
        key=f"{abs(hash((recipe, seed))):012x}"[:12],
        label=f"data/net/{recipe}/seed={seed}",
        identity={
            "dataset": ["data", {}, "d0"],
            "model": ["net", {}, "w0"],
            "recipe": [list(parse(step)) for step in recipe.split(" + ")],
            "calibration": [16, 0, "m0"],
            "seed": seed,
        },
        recipe=recipe,
        status=status,
        phase="done" if status == "ok" else "quantize",
        error=None if status == "ok" else "it went wrong\nin detail",
        started="2026-01-01T00:00:00+00:00",
        task="classification",
        bits={"weights": None if recipe == "fp32" else 4.0, "activations": None},
        metrics={name: Measurement(unit="u", direction="lower", **fields) for name, fields in metrics.items()},
    )
    return made, np.arange(N) < right


def judge(*runs: tuple[Result, np.ndarray]) -> Any:
    outcomes = {r.key: {"correct": correct} for r, correct in runs}
    (table,) = tables([r for r, _ in runs], outcomes.__getitem__)
    return table


def size(file_bytes: int) -> dict[str, Any]:
    values = {"file_bytes": file_bytes, "packed_bytes": file_bytes, "nominal_bytes": file_bytes, "float_bytes": 800}
    return {"status": "ok", "values": values}


def test_rows_tell_which_toolkit_they_are_of() -> None:
    runs = [result("fp32", 390), result("theirs", 300), result("theirs", 301, seed=1), result("ours", 310)]
    for (run, _), version in zip(runs[1:3], ("3.4.0", "3.5.0"), strict=True):
        run.records["toolkit"] = {"name": "nncf", "version": version}
    table = judge(*runs)
    page = render([table], title="t")
    assert "| theirs (2 seeds) (nncf 3.4.0, nncf 3.5.0) |" in page
    assert "| ours    " in page
    assert frame([table]).set_index("recipe")["toolkit"].dropna().to_dict() == {"theirs": "nncf 3.4.0, nncf 3.5.0"}


def test_ranks_ties_drops_and_failures() -> None:
    table = judge(
        result("fp32", 390),
        result("good", 388),
        result("alike", 387),
        result("bad", 200),
        result("broken", 0, status="timeout"),
    )
    assert [(row.recipe, row.rank) for row in table.rows] == [
        ("fp32", ""),
        ("good", "1="),
        ("alike", "1="),
        ("bad", "3"),
        ("broken", ""),
    ]
    bad = table.rows[3]
    assert bad.drop.estimate == pytest.approx((200 - 390) / N)
    assert bad.drop.high < 0
    assert not table.rows[1].drop.excludes_zero
    page = render([table], title="t")
    assert "timeout in quantize" in page
    assert "broken: it went wrong" in page
    assert "in detail" not in page


def test_seeds_are_one_row() -> None:
    table = judge(result("fp32", 390), result("random", 300), result("random", 320, seed=1))
    assert len(table.rows) == 2
    assert table.rows[1].score == pytest.approx(310 / N)
    assert "random (2 seeds)" in render([table], title="t")


def test_sizes_and_ratio() -> None:
    table = judge(result("fp32", 390, size=size(800)), result("small", 390, size=size(100)))
    assert table.rows[1].cells["compression_ratio"] == 8
    assert "8.00" in render([table], title="t")


def test_what_was_not_measured_has_its_reason() -> None:
    reason = {"status": "unsupported", "error": "not deployable as integers: weights only"}
    energy = {"status": "unsupported", "error": "not measurable here: no RAPL, no NVML"}
    table = judge(result("fp32", 390, energy=energy), result("small", 390, latency=reason, energy=energy))
    page = render([table], title="t")
    assert "latency: not deployable as integers: weights only" in page
    assert page.count("energy: not measurable here: no RAPL, no NVML") == 1
    assert "mJ / image" not in page


def test_unknown_metrics_are_shown() -> None:
    table = judge(result("fp32", 390, mine={"status": "ok", "values": {"value": 42.0}}))
    page = render([table], title="t")
    assert "mine (u)" in page
    assert "42" in page


def test_without_a_reference_there_is_no_drop() -> None:
    table = judge(result("good", 388))
    assert table.reference is None
    assert table.rows[0].drop is None


def test_more_bits_that_are_significantly_worse_raise_an_alarm() -> None:
    table = judge(result("rtn[bits=8]", 300), result("rtn[bits=6]", 340), result("rtn[bits=4]", 301))
    worse = next(row for row in table.rows if row.recipe == "rtn[bits=8]")
    (alarm,) = worse.alarms
    assert (alarm.how, alarm.other.recipe) == ("more bits", "rtn[bits=6]")
    assert alarm.difference.estimate == pytest.approx(-40 / N)
    page = render([table], title="t")
    assert "rtn[bits=8] ⚠" in page
    assert "⚠ more bits, worse: rtn[bits=8] (75.00) is below rtn[bits=6] (85.00) by 10.00 [" in page
    assert page.count("⚠") == 2
    flags = frame([table]).set_index("recipe")["alarm"]
    assert flags["rtn[bits=8]"] == "more bits, worse than rtn[bits=6]"
    assert flags["rtn[bits=4]"] == ""


def test_no_alarm_without_significance_or_for_other_recipes() -> None:
    quiet = judge(result("rtn[bits=8]", 338), result("rtn[bits=6]", 340), result("kmeans[bits=4]", 390))
    assert not any(row.alarms for row in quiet.rows)
    right = judge(result("rtn[bits=8]", 340), result("rtn[bits=6]", 300), result("rtn[bits=9]", 0, status="error"))
    assert not any(row.alarms for row in right.rows)
    assert "⚠" not in render([quiet, right], title="t")


def test_published_files(tmp_path: Path) -> None:
    table = judge(result("fp32", 390, size=size(800)), result("small", 380, size=size(100)))
    page = publish([table], tmp_path, title="t")
    assert page.read_text().startswith("# t\n")
    frame = pd.read_csv(tmp_path / "leaderboard.csv")
    assert frame.loc[1, "score"] == pytest.approx(380 / N)
    assert frame.loc[1, "difference"] == pytest.approx(-10 / N)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LEADERBOARD.md", "leaderboard.csv"]


def test_other_calibration_images_weights_or_data_are_another_table() -> None:
    runs = [result(recipe, right + i, seed=i) for i in range(4) for recipe, right in (("fp32", 390), ("small", 380))]
    changes = [{}, {"calibration": [512, 0, "m1"]}, {"model": ["net", {}, "w1"]}, {"dataset": ["data", {}, "d1"]}]
    for i, (run, _) in enumerate(runs):
        run.identity.update(changes[i // 2])
    outcomes = {r.key: {"correct": correct} for r, correct in runs}
    judged = tables([r for r, _ in runs], outcomes.__getitem__)
    assert [len(table.rows) for table in judged] == [2, 2, 2, 2]
    assert sorted(table.calibration for table in judged) == ["16 images, seed 0"] * 3 + ["512 images, seed 0"]
    assert sorted(row.score * N for table in judged for row in table.rows) == pytest.approx(
        [380, 381, 382, 383, 390, 391, 392, 393]
    )
    assert "calibration: 512 images, seed 0, manifest `m1`" in render(judged, title="t")


def test_rows_of_several_machines_name_theirs() -> None:
    here, there = result("fp32", 390), result("rtn", 380)
    here[0].provenance, there[0].provenance = {"cpu": "small", "cores": 2}, {"cpu": "large", "gpu": "fast"}
    page = render([judge(here, there)], title="t")
    assert "machine 1: large, fast  \nmachine 2: small, 2 cores" in page
    rows = {line.split("|")[2].strip(): line.split("|")[-2].strip() for line in page.splitlines() if "| ok" in line}
    assert rows == {"fp32 (reference)": "2", "rtn": "1"}
    there[0].provenance = here[0].provenance
    page = render([judge(here, there)], title="t")
    assert "machine: small, 2 cores" in page
    assert "| machine" not in page


def test_the_time_to_boxes_stands_beside_that_of_the_network() -> None:
    def timed(quantized: float) -> dict[str, Any]:
        values = {"quantized": [quantized] * 9, "float": [0.004] * 9, "float_again": [0.004] * 9}
        return {"status": "ok", "values": values | {"integer_layers": 3, "compute_layers": 3, "runtime": "openvino"}}

    both = {"latency": timed(0.001), "latency[decoding=true]": timed(0.003)}
    table = judge(result("fp32", 390), result("small", 390, **both))
    cells = next(row.cells for row in table.rows if row.recipe == "small")
    assert cells["latency_ratio"].estimate == pytest.approx(0.25)
    assert cells["latency_ratio[decoding=true]"].estimate == pytest.approx(0.75)
    row = next(line for line in render([table], title="t").splitlines() if "small" in line)
    assert [cell.strip() for cell in row.split("|")][6:8] == ["0.25 [0.25, 0.25]", "0.75 [0.75, 0.75]"]
