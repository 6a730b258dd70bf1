"""Bit widths under budgets: one width for each layer, so that the sum of the losses is least."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qbench.errors import UserError

Solver = Literal["milp", "greedy"]
# The solver stops within 1e-6 of the optimum, in the objective's own unit: with this, a ten-thousandth of that.
_UNIT = 1e4


@dataclass(frozen=True)
class Budget:
    """What a choice of widths may cost in all."""

    name: str
    """What it limits, for messages."""
    costs: np.ndarray
    """(layers, widths), at least 0."""
    limit: float
    """Above 0. The solver keeps it to within a millionth of itself."""


def allocate(
    losses: np.ndarray, budgets: Sequence[Budget], ties: Sequence[Sequence[int]] = (), solver: Solver = "milp"
) -> np.ndarray:
    """One width for each layer: the least sum of losses within all budgets.

    Args:
        losses: (layers, widths), finite; the widths in falling order.
        budgets: what must not be exceeded.
        ties: layers, by row, that must have the same width; ties that share a layer are one.
        solver: `milp` finds an optimum (integer programming, as HAWQ-V3, arXiv:2011.10680); `greedy` begins with the
            greatest widths and lowers, step by step, that of the layer that loses least for what it saves of the
            budgets that are still exceeded.

    Returns:
        (layers,): the column of each layer's width.

    Raises:
        UserError: no choice is within the budgets.
    """
    groups = _groups(len(losses), ties)
    merged = [Budget(budget.name, _summed(budget.costs, groups), budget.limit) for budget in budgets]
    for budget in merged:
        least = float(budget.costs.min(1).sum())
        if least > budget.limit:
            raise UserError(
                f"budget {budget.name}: the cheapest widths cost {least:.6g}, but {budget.limit:.6g} is the limit; "
                "raise it, or allow narrower widths"
            )
    return {"milp": _milp, "greedy": _greedy}[solver](_summed(losses, groups), merged)[groups]


def _groups(layers: int, ties: Sequence[Sequence[int]]) -> np.ndarray:
    """(layers,): the group of each layer."""
    pairs = np.array([pair for tie in ties for pair in itertools.pairwise(tie)], dtype=int).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(layers, layers))
    labels: np.ndarray = connected_components(graph, directed=False)[1]
    return labels


def _summed(table: np.ndarray, groups: np.ndarray) -> np.ndarray:
    sums = np.zeros((groups.max() + 1, table.shape[1]))
    np.add.at(sums, groups, table)
    return sums


def _milp(losses: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
    groups, widths = losses.shape
    one_each = LinearConstraint(np.kron(np.eye(groups), np.ones(widths)), 1, 1)
    limits = [LinearConstraint(budget.costs.reshape(1, -1) / budget.limit, -np.inf, 1) for budget in budgets]
    found = milp(
        losses.ravel() * (_UNIT / (np.abs(losses).max() or 1.0)),
        integrality=np.ones(losses.size, dtype=int),
        bounds=Bounds(0, 1),
        constraints=[one_each, *limits],
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise _apart(budgets)
    chosen: np.ndarray = found.x.reshape(groups, widths).argmax(1)
    return chosen


def _greedy(losses: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
    rows = np.arange(len(losses))
    chosen = np.zeros(len(losses), dtype=int)
    while exceeded := [b for b in budgets if b.costs[rows, chosen].sum() > b.limit * (1 + 1e-9)]:
        lower = np.minimum(chosen + 1, losses.shape[1] - 1)
        saved = sum((b.costs[rows, chosen] - b.costs[rows, lower]) / b.limit for b in exceeded)
        possible = np.asarray(saved) > 0
        if not possible.any():
            raise _apart(budgets)
        price = np.full(len(losses), np.inf)
        np.divide(losses[rows, lower] - losses[rows, chosen], saved, out=price, where=possible)
        chosen[price.argmin()] += 1
    return chosen


def _apart(budgets: Sequence[Budget]) -> UserError:
    return UserError(f"the budgets {', '.join(b.name for b in budgets)} cannot be met together; raise one of them")
