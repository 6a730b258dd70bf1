"""Power-of-two level sets against the reference's, and k-means against known optima."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.quant import clustering
from qbench.quant.clustering import kmeans
from qbench.quant.levels import apot_levels, mirrored, nearest_scaled, pot_levels

LLOYD_MAX = {
    2: ([0.7979], 0.36338),
    4: ([0.4528, 1.5104], 0.117482),
    8: ([0.2451, 0.7560, 1.3439, 2.1519], 0.034548),
    16: ([0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326], 0.009501),
}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("name", "levels"), [("pot", pot_levels), ("apot", apot_levels)])
def test_golden_levels(shared, name, levels, bits):
    golden = np.load(shared / "golden" / "baselines.npz")[f"{name}_levels_B{bits}"]
    np.testing.assert_allclose(levels(bits).numpy(), golden, rtol=1e-6)


@pytest.mark.parametrize("bits", range(1, 7))
def test_apot_levels_are_all_different(bits):
    levels = apot_levels(bits)
    assert levels.unique().numel() == 2**bits
    assert (levels[0], levels[-1]) == (0, 1)
    assert mirrored(levels).numel() == 2 ** (bits + 1) - 1


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_scaled_levels(granularity):
    weight = gaussian(6, 2, 3, 3) * torch.logspace(-2, 1, 6).reshape(6, 1, 1, 1)
    code = nearest_scaled(weight, mirrored(apot_levels(3)), granularity)
    assert code.scale.shape == ((1, 1) if granularity == "tensor" else (6, 1))
    again = nearest_scaled(code.decode(), mirrored(apot_levels(3)), granularity)
    assert torch.allclose(again.decode(), code.decode(), rtol=1e-4)
    relative = (code.decode() - weight).square().sum() / weight.square().sum()
    assert relative < 0.05


def error(rows, levels):
    return (rows.double()[:, :, None] - levels.double()[:, None]).square().amin(2).sum(1)


def brute_force(row, k):
    row, n = np.sort(row), len(row)
    cuts = ((0, *inner, n) for inner in itertools.combinations(range(1, n), k - 1))
    return min(sum(((row[a:b] - row[a:b].mean()) ** 2).sum() for a, b in itertools.pairwise(c)) for c in cuts)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_the_optimal_start_is_optimal(n, k, seed, ties):
    rows = gaussian(3, n, seed=seed)
    rows = (rows * 2).round() if ties else rows
    levels = kmeans(rows, k)
    assert levels.shape == (3, min(k, n))
    assert (levels.diff(dim=1) >= 0).all()
    known = [brute_force(row, min(k, n)) for row in rows.double().numpy()]
    assert error(rows, levels).tolist() == pytest.approx(known, abs=1e-9)


@pytest.mark.parametrize("k", [2, 4, 8, 16])
def test_lloyd_max_levels_of_a_gaussian(k):
    # Its quantiles rather than a sample, whose tails move the outer levels.
    x = torch.special.ndtri((torch.arange(200_000.0, dtype=torch.float64)[None] + 0.5) / 200_000)
    levels, mse = LLOYD_MAX[k]
    found = kmeans(x, k)
    assert found[0, k // 2 :].tolist() == pytest.approx(levels, abs=0.005)
    nearest = found[0][torch.bucketize(x, (found[0, 1:] + found[0, :-1]) / 2)]
    assert float((nearest - x).square().mean()) == pytest.approx(mse, rel=0.01)


@pytest.mark.parametrize("start", ["linear", "kmeans++"])
@pytest.mark.parametrize("k", [2, 3, 8, 16])
def test_optimal_is_no_worse_than_lloyd_from_elsewhere(start, k):
    rows = gaussian(6, 300, seed=k)
    assert (error(rows, kmeans(rows, k)) <= error(rows, kmeans(rows, k, start)) * (1 + 1e-6)).all()


def test_lloyd_never_gets_worse():
    rows = np.sort(gaussian(4, 200).double().numpy(), axis=1)
    levels = np.linspace(rows[:, 0], rows[:, -1], 12, axis=1)
    errors = []
    for _ in range(15):
        errors.append(error(torch.from_numpy(rows), torch.from_numpy(levels)))
        levels = clustering.lloyd(rows, levels, iterations=1)
    assert (torch.stack(errors).diff(dim=0) <= 1e-9).all()


def test_enough_levels_leave_no_error():
    rows = torch.tensor([[1.0, 1.0, 2.0, 5.0, 5.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    for start in ("optimal", "linear", "kmeans++"):
        assert error(rows, kmeans(rows, 5, start))[1] == 0
    assert (error(rows, kmeans(rows, 3)) == 0).all()


def test_condensing_keeps_the_mean():
    rows = np.sort(gaussian(2, 1003).double().numpy(), axis=1)
    means, counts = clustering.condense(rows, 10)
    assert counts.sum() == 1003
    np.testing.assert_allclose((means * counts).sum(1), rows.sum(1))


def test_plus_plus_follows_its_seed():
    rows = gaussian(2, 500)
    assert torch.equal(kmeans(rows, 8, "kmeans++", seed=1), kmeans(rows, 8, "kmeans++", seed=1))
