"""Levels that follow a distribution, and rounded logarithms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.quant.clustering import kmeans
from qbench.quant.encodings import Codebook
from qbench.quant.levels import (
    empirical_levels,
    gaussian_levels,
    nearest_logarithm,
    nearest_scaled,
    quantile_levels,
)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("bits", "half", "error"),
    [
        (1, [0.7979], 0.36338),
        (2, [0.4528, 1.5104], 0.117482),
        (3, [0.2451, 0.7560, 1.3439, 2.1519], 0.034548),
        (4, [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326], 0.009501),
    ],
)
def test_the_levels_of_lloyd_and_max(bits, half, error):
    levels = gaussian_levels(bits)
    assert levels[2 ** (bits - 1) :].tolist() == pytest.approx(half, abs=2e-4)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-6)
    x = gaussian(1, 400_000)
    code = Codebook.nearest(x, levels)
    assert float((code.decode() - x).square().mean()) == pytest.approx(error, rel=0.01)
    scaled = nearest_scaled(3 * x, levels, "tensor")
    assert float(scaled.scale) == pytest.approx(3, rel=0.04)


def test_eight_bits_follow_the_law_of_many_levels():
    x = torch.special.ndtri((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000)[None]
    error = (Codebook.nearest(x.float(), gaussian_levels(8)).decode() - x).square().mean()
    assert float(error) == pytest.approx(3**0.5 * np.pi / 2 / 4**8, rel=0.03)


def test_empirical_levels_are_a_local_optimum_and_better_than_the_wrong_distribution():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(4, 5000, generator=generator) * torch.tensor([[1.0], [0.1], [30.0], [0.0]]) * 2
    rows -= rows.mean(1, keepdim=True)
    rows[3] = 0
    own, normal = empirical_levels(rows, 3), gaussian_levels(3)
    assert own.diff().std() < 0.04  # uniform points have equidistant levels
    errors = [
        ((nearest_scaled(rows, levels, "channel").decode() - rows).square().mean(1) / rows.var(1))[:3].mean()
        for levels in (own, normal)
    ]
    assert errors[0] < 0.9 * errors[1]
    best = kmeans(rows[:1], 8)
    least = (Codebook.nearest(rows[:1], best).decode() - rows[:1]).square().mean() / rows[0].var()
    assert least * 0.99 <= errors[0] <= least * 1.05


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.sampled_from([2, 4, 16]))
def test_bins_of_equal_mass(seed, n, count):
    rows = gaussian(3, n, seed=seed)
    levels, bounds = quantile_levels(rows, count)
    codes = torch.searchsorted(bounds, rows)
    k = min(n, count)
    assert levels.shape == (3, k)
    for row, level, code in zip(rows, levels, codes, strict=True):
        frequency = torch.bincount(code, minlength=k)
        assert frequency.max() - frequency.min() <= 1
        means = torch.stack([row[code == i].mean() for i in range(k)])
        assert torch.allclose(means, level, atol=1e-5)
    if n <= count:
        assert torch.allclose(levels.gather(1, codes), rows, atol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_logarithms_are_rounded(granularity):
    weight = gaussian(6, 50) * torch.logspace(-3, 3, 6)[:, None]
    weight[2] = 0
    code = nearest_logarithm(weight, 4, granularity)
    decoded = code.decode()
    assert code.scale.shape == ((1, 1) if granularity == "tensor" else (6, 1))
    used = decoded[decoded != 0].abs().log2()
    assert torch.equal(used, used.round())
    nonzero = (decoded != 0) & (weight.abs() <= code.scale)
    assert ((decoded[nonzero] / weight[nonzero]).log2().abs() <= 0.5 + 1e-6).all()
    dropped = (decoded == 0) & (weight != 0)
    smallest = code.scale.expand_as(weight)[dropped] * 2**-6
    assert (weight[dropped].abs() <= smallest * 2**-0.5 * 1.000001).all()
    assert (decoded[2] == 0).all()


def test_a_logarithm_is_not_the_nearest_number():
    # 1.45 is nearer to 1 than to 2, but its logarithm, 0.54, rounds to 1.
    weight = torch.tensor([[1.45, 1.40, 2.0, -1.45]])
    assert nearest_logarithm(weight, 4, "tensor").decode().tolist() == [[2.0, 1.0, 2.0, -2.0]]
