"""Profiles are read strictly; what a network lacks for one is said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_board import N, result

from qbench import profiles
from qbench.board import tables
from qbench.errors import UserError
from qbench.markdown import render
from qbench.profiles import load, violations

WEIGHT = {"kind": "Affine", "bits": 8, "symmetric": True, "power_of_two": False, "granularity": "channel"}
INPUT = {"kind": "static", "bits": 8, "symmetric": False, "power_of_two": False}


def facts(**changes: Any) -> dict[str, Any]:
    layers = {name: {"weight": dict(WEIGHT), "input": dict(INPUT)} for name in ("first", "middle", "last")}
    return {"layers": layers, "edges": {}, "float_edges": 2, "norms": 0, **changes}


def changed(layer: str, part: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(facts())
    made["layers"][layer][part] = {**made["layers"][layer][part], **value} if isinstance(value, dict) else value
    return made


def test_all_that_come_with_qbench_are_sound() -> None:
    assert {"inputs", "every_edge", "weight_only", "academic", "fbgemm", "tensorrt", "power_of_two"} == set(
        profiles.names()
    )
    for name in profiles.names():
        profile = load(name)
        assert profile.description.endswith(".")
        assert profile.source


@pytest.mark.parametrize(
    ("found", "reasons"),
    [
        (facts(), []),
        (changed("middle", "weight", None), ["float weights (1 of 3 layers)"]),
        (changed("middle", "weight", {"bits": 4}), ["weights of 4 bits (1 of 3 layers)"]),
        (changed("middle", "weight", {"granularity": "group"}), ["weights with a scale per group (1 of 3 layers)"]),
        (changed("middle", "weight", {"granularity": "tensor"}), []),
        (changed("middle", "weight", {"symmetric": False}), ["weights with zero points (1 of 3 layers)"]),
        (changed("middle", "weight", {"kind": "Cast"}), ["weights on no uniform grid, but Cast (1 of 3 layers)"]),
        (changed("middle", "input", None), ["float inputs (1 of 3 layers)"]),
        (changed("first", "input", {"kind": "dynamic"}), ["dynamic input quantizers (1 of 3 layers)"]),
        (changed("first", "input", {"bits": 4}), ["inputs of 4 bits (1 of 3 layers)"]),
        (facts(edges={"a": INPUT}), ["1 operands of sums, joins or pools are quantized"]),
        (facts(norms=5), []),
    ],
)
def test_what_a_network_lacks_for_quantized_inputs(found: dict[str, Any], reasons: list[str]) -> None:
    assert violations(load("inputs"), found) == reasons


def test_what_it_lacks_for_other_hardware() -> None:
    assert violations(load("every_edge"), facts(norms=2)) == [
        "2 operands of sums, joins or pools are float",
        "2 batch norms are not folded",
    ]
    assert violations(load("every_edge"), facts(float_edges=0, edges={"a": INPUT, "b": INPUT})) == []
    unknown = facts(float_edges=None, reason="it cannot be traced")
    assert violations(load("every_edge"), unknown) == [
        "it is not known which sums and joins read floats: it cannot be traced"
    ]
    whole = facts(float_edges=0, edges={"a": INPUT})
    assert violations(load("tensorrt"), whole) == [
        "inputs with zero points (3 of 3 layers)",
        "inputs with zero points of sums, joins or pools (1)",
    ]
    assert "weights whose scales are no powers of two (3 of 3 layers)" in violations(load("power_of_two"), whole)
    assert violations(load("weight_only"), facts()) == ["quantized inputs (3 of 3 layers)"]


def test_both_ends_may_have_another_width() -> None:
    narrow = changed("middle", "weight", {"bits": 4, "granularity": "tensor"})
    for name in ("first", "last"):
        narrow["layers"][name]["weight"]["granularity"] = "tensor"
    assert violations(load("academic"), narrow) == []
    narrow["layers"]["first"]["weight"] = None
    assert violations(load("academic"), narrow) == ["float weights (1 of 3 layers)"]


GOOD = profiles.path_of("fbgemm").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD + "colour: red\n", "colour: extra inputs are not permitted"),
        (GOOD.replace("fold_bn: true", ""), "fold_bn: field required"),
        (GOOD.replace("bits: [8]", "bits: []"), r"weights.bits: list should have at least 1 item"),
        (GOOD.replace("every_edge", "everywhere"), "inputs.placement: input should be 'inputs' or 'every_edge'"),
        (GOOD + "  : [", "not valid YAML"),
    ],
)
def test_a_file_of_ones_own_is_read_strictly(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        load(str(path))
    path.write_text(GOOD)
    assert load(str(path)) == load("fbgemm")


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown profile 'fbgem'; did you mean 'fbgemm'"):
        load("fbgem")


def test_boards_rank_what_fits() -> None:
    measured = {"status": "ok", "values": facts()}
    other = {"status": "ok", "values": changed("middle", "weight", {"bits": 4})}
    runs = [result("fp32", 390), result("wide", 300, placement=measured), result("narrow", 380, placement=other)]
    runs.append(result("unknown", 390))
    outcomes = {r.key: {"correct": np.arange(N) < correct.sum()} for r, correct in runs}
    (table,) = tables([r for r, _ in runs], outcomes.__getitem__, "inputs")
    assert [(row.recipe, row.rank) for row in table.rows] == [
        ("fp32", ""),
        ("wide", "1"),
        ("narrow", ""),
        ("unknown", ""),
    ]
    page = render([table], title="t")
    assert "narrow: weights of 4 bits (1 of 3 layers)" in page
    assert "unknown: the suite lacks the metric placement" in page
    (table,) = tables([r for r, _ in runs], outcomes.__getitem__)
    assert [row.rank for row in table.rows] == ["", "1", "2", "3"]
    assert [row.cells.get("fits") for row in table.rows] == [None, None, "none", "inputs"]
    with pytest.raises(UserError, match="unknown profile"):
        tables([r for r, _ in runs], outcomes.__getitem__, "outputs")
