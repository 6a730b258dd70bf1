"""Entropy-constrained quantization: what it promises about error, bits and levels."""

import numpy as np
import pytest
import torch
from torch import nn

from qbench.quant import clustering
from qbench.quant.coding.entropy import entropy_bits
from qbench.quant.encodings import Codebook
from qbench.quant.entropy_constrained import _cuts, descend, fit
from qbench.quant.layers import encodings
from qbench.registry import parse, resolve


class Data:
    seed = 0

    def record(self, name, values):
        self.values = values


def rate_and_error(points, partition):
    codes = partition.assign(points)
    error = ((points - partition.levels[codes]) ** 2).mean()
    return entropy_bits(np.bincount(codes)) / len(points), error


@pytest.fixture
def gaussian():
    return np.sort(np.random.default_rng(0).normal(size=5000))


@pytest.mark.parametrize("tradeoff", [0.0, 0.003, 0.03, 0.3])
def test_objective_never_grows(gaussian, tradeoff):
    objectives = np.array(descend(gaussian, 24, tradeoff).objectives)
    assert len(objectives) > 1
    assert (np.diff(objectives) <= 1e-12).all()


def test_without_a_price_it_is_lloyd(gaussian):
    found = descend(gaussian, 12, 0.0)
    assert np.allclose(found.cuts, (found.levels[1:] + found.levels[:-1]) / 2, atol=1e-3)
    _, error = rate_and_error(gaussian, found)
    levels = clustering.kmeans(torch.from_numpy(gaussian)[None], 12).numpy()[0]
    best = np.abs(gaussian[:, None] - levels).min(1) ** 2
    assert error == pytest.approx(best.mean(), rel=0.05)


def test_cuts_are_where_two_levels_cost_the_same():
    rng = np.random.default_rng(1)
    levels, share = np.sort(rng.normal(size=30)), rng.dirichlet(np.full(30, 0.3))
    kept, cuts = _cuts(levels, share, 0.1)
    points = np.linspace(-4, 4, 4001)
    cost = (points[:, None] - levels) ** 2 - 0.1 * np.log2(share)
    assert len(kept) < 30
    assert np.array_equal(levels[cost.argmin(1)], kept[np.searchsorted(cuts, points)])


def test_assignment_is_cheapest(gaussian):
    found = descend(gaussian, 24, 0.05)
    codes = found.assign(gaussian)
    share = np.bincount(codes) / len(gaussian)
    cost = (gaussian[:, None] - found.levels) ** 2 - 0.05 * np.log2(share)
    chosen = cost[np.arange(len(gaussian)), codes]
    assert (chosen - cost.min(1)).mean() < 1e-5


def test_better_than_kmeans_at_the_same_entropy(gaussian):
    partition = fit(gaussian, 16)
    assert 12 <= len(partition.levels) <= 16
    rate, error = rate_and_error(gaussian, partition)
    by_count = {}
    for k in range(4, 17):
        levels = clustering.kmeans(torch.from_numpy(gaussian)[None], k).numpy()[0]
        codes = np.abs(gaussian[:, None] - levels).argmin(1)
        by_count[entropy_bits(np.bincount(codes)) / len(gaussian)] = ((gaussian - levels[codes]) ** 2).mean()
    rates = sorted(by_count)
    kmeans = np.exp(np.interp(rate, rates, [np.log(by_count[r]) for r in rates]))
    assert error < 0.9 * kmeans


@pytest.mark.parametrize(
    "points",
    [np.zeros(10), np.array([3.0]), np.array([1.0, 1.0, 2.0]), np.repeat([0.0, 1, 5], 50), np.arange(5.0)],
)
def test_few_distinct_points(points):
    found = fit(points, 8)
    assert np.allclose(found.levels[found.assign(points)], points)
    assert len(fit(points, 2).levels) <= 2


def test_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 4, 3), nn.Linear(30, 20))
    before, data = [m.weight.detach().clone() for m in model], Data()
    model = resolve("method", *parse("ecsq[bits=3,edge_bits=6]"))(model, data)
    found = encodings(model)
    assert all(isinstance(code, Codebook) for code in found.values())
    assert [code.axis for code in found.values()] == [0, 1, 0]
    for layer, weight, name, most in zip(model, before, "012", (64, 8, 64), strict=True):
        assert data.values[name]["levels"] == found[f"{name}.weight"].levels.numel() <= most
        assert data.values[name]["entropy"] < np.log2(most)
        assert (layer.weight - weight).square().mean() < (0.1 if most == 8 else 0.003) * weight.square().mean()
