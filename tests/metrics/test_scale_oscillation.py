from types import SimpleNamespace
from typing import Any

import pytest

from qbench.errors import Unsupported
from qbench.metrics.scale_error import scale_error
from qbench.metrics.scale_oscillation import scale_oscillation

RECORD = {
    "steps": 500,
    "exponent_flips": {"a": 3, "b": 1},
    "exponents": {"a": 1, "b": 4},
    "code_flips": {"a": 20, "b": 0},
    "codes": {"a": 100, "b": 300},
    "pairs": 50,
    "error": {"a": 3.0, "b": 1.0, "dead": 0.0},
    "least_error": {"a": 2.0, "b": 1.0, "dead": 0.0},
}


def finished(records: dict[str, Any]) -> Any:
    return SimpleNamespace(records=records)


def test_flips_for_each_thing_that_can_flip_in_1000_steps() -> None:
    values = scale_oscillation(finished({"oscillation": RECORD}))
    assert values["value"] == pytest.approx(1000 * 4 / 500 / 5)
    assert values["flips"] == {"a": 3, "b": 1}
    codes = scale_oscillation(finished({"oscillation": RECORD}), of="codes")
    assert codes["value"] == pytest.approx(1000 * 20 / 50 / 400)


def test_the_error_of_the_steps_is_compared_with_the_least() -> None:
    values = scale_error(finished({"oscillation": RECORD}))
    assert values["value"] == pytest.approx((1.5 + 1) / 2)
    assert values["error"] == RECORD["error"]


def test_what_has_none_says_so() -> None:
    with pytest.raises(Unsupported, match="does not train"):
        scale_oscillation(finished({}))
    with pytest.raises(Unsupported, match="powers of two"):
        scale_oscillation(finished({"oscillation": RECORD | {"exponent_flips": {}, "exponents": {}}}))
    for records in ({}, {"oscillation": RECORD | {"error": {}, "least_error": {}}}):
        with pytest.raises(Unsupported, match="uniform grids"):
            scale_error(finished(records))
