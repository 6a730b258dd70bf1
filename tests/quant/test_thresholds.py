"""Calibrators against their references and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.quant.encodings import Affine
from qbench.quant.grids import nearest_power
from qbench.quant.observers import Histogram, search_weight
from qbench.quant.thresholds import aciq_factor, aciq_range, divergence, kl_bins

STREAM = ["minmax", "ema", "percentile", "mse", "mse24", "aciq_laplace", "aciq_gauss"]
STREAM += ["kl_tensorrt", "kl_masked", "kl_cfws"]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laplace(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count).exponential_(generator=generator) * gaussian(count, seed=seed + 1).sign()


def observe(*batches, bins=8192):
    histogram = Histogram(bins)
    for batch in batches:
        histogram.observe(batch)
    return histogram


@pytest.fixture
def golden(shared):
    return np.load(shared / "golden" / "baselines.npz")


# ------------------------------------------------------------------------------------------ error to the power of 2.4


def test_the_grid_of_gptq(golden):
    scale, zero = search_weight(torch.tensor(golden["gptq_W"]), bits=4, symmetric=False, calibration="mse24")
    np.testing.assert_allclose(scale[:, 0], golden["gptq_mse24_scale_b4"], rtol=1e-5)
    np.testing.assert_array_equal(zero[:, 0], golden["gptq_mse24_zero_b4"])


def test_the_grid_of_brecq(golden):
    weight = torch.tensor(golden["brecq_W"])
    scale, zero = search_weight(weight, bits=4, symmetric=False, calibration="mse24")
    np.testing.assert_allclose(scale[:, 0], golden["brecq_delta_b4"], rtol=1e-5)
    np.testing.assert_array_equal(zero[:, 0], golden["brecq_zp_b4"])
    np.testing.assert_allclose(Affine.nearest(weight, scale, bits=4, zero_point=zero).decode(), golden["brecq_Wq_b4"])


# ------------------------------------------------------------------------------------------------------------- ACIQ


@pytest.mark.parametrize(
    ("distribution", "bits", "factor"),
    [
        ("laplace", 2, 2.83),
        ("laplace", 3, 3.89),
        ("laplace", 4, 5.03),
        ("laplace", 8, 9.90),
        ("gauss", 2, 1.71),
        ("gauss", 3, 2.15),
        ("gauss", 4, 2.55),
        ("gauss", 8, 3.92),
    ],
)
def test_the_published_clips(distribution, bits, factor):
    assert aciq_factor(bits, distribution) == pytest.approx(factor, abs=0.01)


def test_aciq_clips_what_it_assumes():
    x = laplace(200_000)
    low, high = observe(x * 0.5 + 0.1).range("aciq_laplace", 0, bits=4)
    assert (low, high) == (pytest.approx(0.1 - 2.515, rel=0.02), pytest.approx(0.1 + 2.515, rel=0.02))
    low, high = observe(gaussian(200_000) * 3).range("aciq_gauss", 0, bits=4, symmetric=True)
    assert (low, high) == (pytest.approx(-7.65, rel=0.02), pytest.approx(7.65, rel=0.02))


def test_half_a_distribution_gets_all_the_levels():
    low, high = observe(laplace(200_000).relu()).range("aciq_laplace", 0, bits=4)
    assert (low, high) == (0, pytest.approx(aciq_factor(5, "laplace"), rel=0.02))
    low, high = observe(gaussian(200_000).relu()).range("aciq_gauss", 0, bits=4)
    assert (low, high) == (0, pytest.approx(aciq_factor(5, "gauss"), rel=0.02))


def test_aciq_is_near_the_least_error_for_weights():
    x = gaussian(1, 100_000)
    for bits in (3, 4, 5):
        best, _ = search_weight(x, bits=bits, calibration="mse")
        found, _ = search_weight(x, bits=bits, calibration="aciq_gauss")
        errors = [float((Affine.nearest(x, s, bits=bits).decode() - x).square().mean()) for s in (best, found)]
        assert errors[0] <= errors[1] <= errors[0] * 1.15


def test_padding_is_not_part_of_the_distribution():
    weight = gaussian(3, 70)
    scale, _ = search_weight(weight, bits=3, granularity="group", group_size=64, calibration="aciq_laplace")
    alone, _ = search_weight(weight[:, 64:].clone(), bits=3, calibration="aciq_laplace")
    assert torch.allclose(scale[:, 1:], alone)


def test_tiny_and_huge_rows_keep_their_shape():
    row = gaussian(1, 500)
    ones = torch.ones_like(row)
    expected = aciq_range(row, ones, bits=4, symmetric=True, distribution="gauss")[1]
    for factor in (1e-30, 1e30):
        found = aciq_range(row * factor, ones, bits=4, symmetric=True, distribution="gauss")[1]
        assert torch.allclose(found / factor, expected, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------- divergence


def test_the_divergences_of_the_reference(golden):
    p, q = golden["kl_p"], golden["kl_q"]
    assert divergence(p, q, "kl_cfws") == pytest.approx(float(golden["kl_cfws"]), abs=1e-12)
    assert divergence(p, q, "kl_masked") == pytest.approx(float(golden["kl_masked"]), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=3, max_size=20))
def test_equal_histograms_do_not_diverge(counts):
    p = np.array(counts, float)
    for form in ("kl_tensorrt", "kl_masked", "kl_cfws"):
        assert divergence(p, p, form) == pytest.approx(0, abs=1e-12)
    q = p[::-1].copy()
    assert divergence(p, q, "kl_tensorrt") == pytest.approx(divergence(p, q, "kl_masked"))
    assert divergence(p, q, "kl_masked") >= -1e-12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=20))
def test_the_form_of_cfws_differs_by_the_ratio_of_the_sums(counts):
    p, q = np.array([(1, 2), *counts], float).T
    mass = p[(p > 0) & (q > 0)].sum() / p.sum()
    apart = divergence(p, q, "kl_cfws") - divergence(p, q, "kl_masked")
    assert apart == pytest.approx(2 * math.log(p.sum() / q.sum()) * mass)


def test_nothing_where_there_is_something_diverges_much():
    p, q = np.array([5.0, 5, 5]), np.array([7.5, 7.5, 0])
    assert divergence(p, q, "kl_tensorrt") > 2


@pytest.mark.parametrize("form", ["kl_tensorrt", "kl_masked", "kl_cfws"])
def test_a_lone_outlier_is_clipped(form):
    counts = np.histogram(np.abs(np.random.default_rng(0).normal(size=200_000)), 2048, (0, 40))[0]
    counts[-1] = 1
    assert 128 <= kl_bins(counts, 128, form) < 400


@pytest.mark.parametrize("form", ["kl_tensorrt", "kl_masked", "kl_cfws"])
def test_flat_and_sparse_histograms_are_not_clipped(form):
    assert kl_bins(np.full(2048, 10), 128, form) == 2048
    sparse = np.zeros(2048)
    sparse[[3, 700, 2047]] = 10
    assert kl_bins(sparse, 128, form) == 2048


@pytest.mark.parametrize("form", ["kl_tensorrt", "kl_masked", "kl_cfws"])
def test_a_range_holds_as_many_values_as_it_has_levels(form):
    grey = np.zeros(2048)
    grey[np.arange(16) * 136 + 5] = 100  # of few values, the first alone would be the same before and after
    assert kl_bins(grey, 8, form) >= 7 * 136 + 6


@pytest.mark.parametrize("form", ["kl_tensorrt", "kl_masked", "kl_cfws"])
def test_the_zeros_of_a_relu_do_not_count(form):
    x = gaussian(50_000).abs()
    spiked = torch.cat([x, torch.zeros(200_000)])
    assert observe(spiked).range(form, 0)[1] == pytest.approx(observe(x).range(form, 0)[1], rel=0.02)


# ------------------------------------------------------------------------------------------------------------ streams


def test_the_moving_average_of_extremes():
    histogram = observe(torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 12.0]), torch.tensor([0.0, 2.0]))
    low, high = histogram.range("ema", 0)
    assert low == pytest.approx(0.9 * (0.9 * -1 + 0.1 * -3))
    assert high == pytest.approx(0.9 * (0.9 * 2 + 0.1 * 12) + 0.1 * 2)


@pytest.mark.parametrize("calibration", STREAM)
@pytest.mark.parametrize("constant", [0.0, 2.5, -2.5])
def test_constant_streams(calibration, constant):
    scale, zero = observe(torch.full((10,), constant)).grid(bits=8, calibration=calibration)
    code = min(max(round(constant / scale) + zero, 0), 255)
    assert (code - zero) * scale == pytest.approx(constant, rel=0.01)


@pytest.mark.parametrize("calibration", STREAM)
def test_every_calibration_stays_within_what_was_seen(calibration):
    for x in (gaussian(5000), gaussian(5000).relu(), -gaussian(5000).abs(), gaussian(5)):
        for bits in (2, 8, 16):
            histogram = observe(x)
            low, high = histogram.range(calibration, 99.9, bits=bits)
            assert min(0, histogram.low) <= low <= 0 <= high <= max(0, histogram.high)
            assert high > low
            scale, zero = histogram.grid(bits=bits, calibration=calibration)
            assert scale > 0
            assert 0 <= zero < 2**bits


# ------------------------------------------------------------------------------------------------------ powers of two


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 500), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from(["minmax", "mse"]))
def test_no_neighbour_among_powers_of_two_is_better(seed, bits, symmetric, calibration):
    weight = gaussian(3, 40, seed=seed) * torch.tensor([[0.02], [1.0], [7.0]])
    options = {"bits": bits, "symmetric": symmetric, "calibration": calibration}
    scale, zero = search_weight(weight, power_of_two=True, **options)
    exponent = scale.log2()
    assert torch.equal(exponent, exponent.round())
    plain, _ = search_weight(weight, **options)
    low, high = (0, 2**bits - 1) if zero is not None else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    offset = 0 if zero is None else zero

    def error(step):
        return (((weight / step).round() + offset).clamp(low, high) - offset).mul(step).sub(weight).square().sum(1)

    for rounded in (plain.log2().floor().exp2(), plain.log2().ceil().exp2(), plain.log2().round().exp2()):
        assert (error(scale) <= error(rounded) * (1 + 1e-5)).all()


def test_rounding_the_logarithm_is_not_optimal():
    # log2 of the step 1.5 rounds up to 2, which is farther from these points than 1.
    points = torch.tensor([[1.0, 1.0, 1.0, 3.0]])
    step = torch.tensor([1.5])
    assert math.log2(float(step)) > 0.5
    assert nearest_power(points, step, None, bits=3, mass=None).tolist() == [1.0]


def test_a_stream_on_a_power_of_two():
    scale, zero = observe(gaussian(20_000)).grid(bits=8, calibration="mse", power_of_two=True)
    assert math.log2(scale) == round(math.log2(scale))
    assert 100 < zero < 156
