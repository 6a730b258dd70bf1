"""Bit widths under budgets: known optima, brute force, and what cannot be."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.analysis.allocation import Budget, allocate
from qbench.errors import UserError

TIES = [(4, 6), (9, 11), (14, 16)]


@pytest.fixture(scope="module")
def hawq(shared):
    """The HAWQ-V3 instance of ResNet-18, columns 8 and 4 bits."""
    arrays = np.load(shared / "golden" / "baselines.npz")
    get = lambda name: arrays[f"hawq_{name}"]  # noqa: E731
    costs = {
        "size": np.outer(get("params_Mi"), [8, 4]) / 8,
        "bops": np.outer(get("bops"), [1 / 16, 1 / 64]),
        "latency": np.stack([get("lat8"), get("lat4")], 1),
    }
    return arrays, get("trace")[:, None] * np.stack([get("d8"), get("d4")], 1), costs


def solve_hawq(hawq, cost, share, solver="milp"):
    _, losses, costs = hawq
    wide, narrow = costs[cost].sum(0)
    chosen = allocate(losses, [Budget(cost, costs[cost], narrow + share * (wide - narrow))], TIES, solver)
    saved = losses[:, 0] - losses[:, 1]
    return np.array([8, 4])[chosen], float(saved[chosen == 0].sum())


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("cost", ["size", "bops"])
def test_hawq_v3_optima_are_found(hawq, cost, share):
    bits, _ = solve_hawq(hawq, cost, share)
    assert bits.tolist() == hawq[0][f"hawq_bits_{cost}{share}"].tolist()


@pytest.mark.parametrize(
    ("cost", "bits", "objective"),
    [
        ("size", [8] * 15 + [4, 8, 4, 4], -1.233207),
        ("bops", [8, 8, 8, 4, 8, 8, 8, 8, 4, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4], -1.092024),
        ("latency", [8, 8, 8, 8, 8, 4, 8, 8, 4, 8, 8, 8, 4, 4, 8, 4, 8, 4, 4], -1.105039),
    ],
)
def test_hawq_v3_objectives(hawq, cost, bits, objective):
    found, value = solve_hawq(hawq, cost, 0.5)
    assert found.tolist() == bits
    assert value == pytest.approx(objective, abs=1e-6)


def test_greedy_meets_the_budget_and_never_beats_the_optimum(hawq):
    for cost, share in itertools.product(hawq[2], (0.25, 0.5, 0.75)):
        bits, value = solve_hawq(hawq, cost, share, "greedy")
        wide, narrow = hawq[2][cost].sum(0)
        spent = np.where(bits == 8, hawq[2][cost][:, 0], hawq[2][cost][:, 1]).sum()
        assert spent <= narrow + share * (wide - narrow) + 1e-9
        assert value >= solve_hawq(hawq, cost, share)[1] - 1e-9
        assert all(bits[a] == bits[b] for a, b in TIES)


@st.composite
def instances(draw):
    layers, widths = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    table = lambda low, high: st.lists(st.integers(low, high), min_size=layers * widths, max_size=layers * widths)  # noqa: E731
    losses = np.array(draw(table(0, 1000)), dtype=float).reshape(layers, widths)
    budgets = []
    for number in range(draw(st.integers(1, 2))):
        costs = np.array(draw(table(0, 50)), dtype=float).reshape(layers, widths)
        budgets.append(Budget(f"b{number}", costs, draw(st.integers(1, 50 * layers))))
    pairs = st.lists(st.lists(st.integers(0, layers - 1), min_size=2, max_size=3), max_size=2)
    return losses, budgets, draw(pairs)


@settings(max_examples=50, deadline=None)
@given(instances())
def test_no_choice_is_better(instance):
    losses, budgets, ties = instance
    rows = np.arange(len(losses))
    allowed = [
        choice
        for choice in itertools.product(range(losses.shape[1]), repeat=len(losses))
        if all(len({choice[i] for i in tie}) == 1 for tie in ties)
        and all(b.costs[rows, choice].sum() <= b.limit for b in budgets)
    ]
    if not allowed:
        with pytest.raises(UserError, match="budget"):
            allocate(losses, budgets, ties)
        return
    chosen = tuple(allocate(losses, budgets, ties))
    assert chosen in allowed
    assert losses[rows, chosen].sum() == min(losses[rows, choice].sum() for choice in allowed)


def test_greedy_takes_the_cheapest_step_first():
    losses = np.array([[0.0, 1.0, 9.0], [0.0, 4.0, 5.0]])
    costs = np.array([[8.0, 4.0, 2.0], [8.0, 4.0, 2.0]])
    budget = lambda limit: [Budget("size", costs, limit)]  # noqa: E731
    assert allocate(losses, budget(16), solver="greedy").tolist() == [0, 0]
    assert allocate(losses, budget(12), solver="greedy").tolist() == [1, 0]
    assert allocate(losses, budget(8), solver="greedy").tolist() == [1, 1]
    assert allocate(losses, budget(6), solver="greedy").tolist() == [1, 2]


@pytest.mark.parametrize("solver", ["milp", "greedy"])
def test_budgets_that_cannot_be_met_are_named(solver):
    losses = np.zeros((2, 2))
    one, other = np.array([[0.0, 2.0], [0.0, 2.0]]), np.array([[2.0, 0.0], [2.0, 0.0]])
    with pytest.raises(UserError, match="budget size: the cheapest widths cost 4, but 3 is the limit"):
        allocate(losses, [Budget("size", one + other + 0.0, 3)], solver=solver)
    with pytest.raises(UserError, match="budgets size, bops cannot be met together"):
        allocate(losses, [Budget("size", one, 1), Budget("bops", other, 1)], solver=solver)
