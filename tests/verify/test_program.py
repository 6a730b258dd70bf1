"""Rectified, clamped and rounded variables have the one value that they should."""

import numpy as np
import pytest

from qbench.verify.program import Program


@pytest.mark.parametrize("ends", [(-3, -1), (-3, 0), (-3, 1), (-3, 5), (0, 1), (0, 5), (1, 5), (3, 5), (2, 2), (-1, 2)])
def test_rectified_and_clamped(ends: tuple[int, int]) -> None:
    for value in np.linspace(*ends, 5):
        program = Program()
        x = program.variable(*ends)
        program.row([x], [1], value, value)
        rectified = program.rectified([x], [2.0], 0.5, 2 * ends[0] + 0.5, 2 * ends[1] + 0.5)
        clamped = program.clamped(x, *ends, 2.0)
        for column, wanted in ((rectified, max(2 * value + 0.5, 0)), (clamped, min(max(value, 0), 2))):
            for sign in (1, -1):
                bound, solution = program.maximum([column], [sign], seconds=10)
                assert sign * bound == pytest.approx(wanted, abs=1e-6)
                assert solution[column] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("value", "wanted"), [(0.5, 1), (0.25, 0), (1.25, 1), (1.5, 2), (2.0, 2), (0.75, 1)])
def test_rounded(value: float, wanted: int) -> None:
    program = Program()
    x = program.variable(value - 1, value - 1)
    rounded = program.rounded([x], [1.0], 1.0, 0, 5, spacing=0.25)
    for sign in (1, -1):
        assert sign * program.maximum([rounded], [sign], seconds=10)[0] == pytest.approx(wanted)


def test_what_cannot_be_has_no_solution() -> None:
    program = Program()
    x = program.variable(0, 1)
    program.row([x], [1], low=2)
    assert program.maximum([x], [1], seconds=10)[1] is None
