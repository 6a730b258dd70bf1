"""Mixed-integer linear programs, built from variables, rectifications and roundings; solved by HiGHS."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Numbers = Sequence[float] | np.ndarray


class Program:
    """Variables are columns, known by their positions; every one has bounds."""

    def __init__(self) -> None:
        self._low: list[float] = []
        self._high: list[float] = []
        self._integer: list[bool] = []
        self._rows: list[tuple[np.ndarray, np.ndarray, float, float]] = []

    def variable(self, low: float, high: float, *, integer: bool = False) -> int:
        """A new column."""
        self._low.append(low)
        self._high.append(high)
        self._integer.append(integer)
        return len(self._low) - 1

    def row(self, columns: Numbers, values: Numbers, low: float = -np.inf, high: float = np.inf) -> None:
        """low <= the sum of values times columns <= high."""
        self._rows.append((np.asarray(columns, int), np.asarray(values, float), low, high))

    def rectified(self, columns: Numbers, values: Numbers, bias: float, low: float, high: float) -> int:
        """max(n, 0) of n = bias + the sum of values times columns, which is from low to high."""
        out = self.variable(max(low, 0.0), max(high, 0.0))
        if high <= 0:
            return out
        negative = -np.asarray(values, float)
        if low >= 0:
            self.row([out, *columns], [1, *negative], bias, bias)
            return out
        above = self.variable(0, 1, integer=True)
        self.row([out, *columns], [1, *negative], low=bias)
        self.row([out, above, *columns], [1, -low, *negative], high=bias - low)
        self.row([out, above], [1, -high], high=0)
        return out

    def rounded(self, columns: Numbers, values: Numbers, bias: float, low: float, high: float, spacing: float) -> int:
        """The whole number from low to high that is nearest to n = bias + the sum of values times columns.

        A half is rounded up: away from zero, but for negative n. All n are whole multiples of `spacing`, 1 / spacing
        being a power of two.
        """
        out = self.variable(low, high, integer=True)
        self.row([out, *columns], [-1, *values], -0.5 - bias, 0.5 - min(spacing, 1.0) / 2 - bias)
        return out

    def clamped(self, column: int, low: float, high: float, top: float) -> int:
        """min(max(x, 0), top) of a column x, which is from low to high."""
        if high <= 0 or low >= top:
            return self.variable(*[min(max(low, 0.0), top)] * 2)
        if low < 0:
            column = self.rectified([column], [1.0], 0.0, low, high)
        if high <= top:
            return column
        out, above = self.variable(max(low, 0.0), top), self.variable(0, 1, integer=True)
        self.row([out, column], [1, -1], high=0)
        self.row([out, column, above], [1, -1, high - top], low=0)
        self.row([out, above], [1, -top], low=0)
        return out

    def maximum(self, columns: Numbers, values: Numbers, seconds: float) -> tuple[float, np.ndarray | None]:
        """The greatest sum of values times columns.

        Returns:
            A number that it does not exceed, up to the solver's tolerances, and is if the time suffices; the columns
            of the best solution that was found, if any.
        """
        objective = np.zeros(len(self._low))
        np.add.at(objective, np.asarray(columns, int), -np.asarray(values, float))
        solved = milp(
            objective,
            integrality=np.array(self._integer, int),
            bounds=Bounds(np.array(self._low), np.array(self._high)),
            constraints=self._constraints(),
            options={"time_limit": seconds},
        )
        least = solved.mip_dual_bound
        if least is None:  # nothing is integer, or there was no time to find out
            least = solved.fun if solved.status == 0 else -np.inf
        return -float(least), solved.x

    def _constraints(self) -> list[LinearConstraint]:
        if not self._rows:
            return []
        columns, values, low, high = zip(*self._rows, strict=True)
        starts = np.cumsum([0, *map(len, columns)])
        matrix = csr_array((np.concatenate(values), np.concatenate(columns), starts), (len(low), len(self._low)))
        return [LinearConstraint(matrix, np.array(low), np.array(high))]
