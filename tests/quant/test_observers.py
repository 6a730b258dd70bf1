"""Known optimal grids, and what must hold of every calibrator."""

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.quant.encodings import Affine
from qbench.quant.grids import exact_step
from qbench.quant.levels import levels_scale
from qbench.quant.observers import Histogram, WeightCalibration, search_weight
from qbench.quant.thresholds import percentile_range


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mse(weight, group_size=None, **options):
    scale, zero = search_weight(weight, group_size=group_size, **options)
    grouped = group_size if options.get("granularity") == "group" else None
    code = Affine.nearest(weight, scale, bits=options["bits"], zero_point=zero, group_size=grouped)
    return float((code.decode() - weight).square().mean())


@pytest.mark.parametrize(("bits", "step", "error"), [(2, 1.224, 0.1902), (3, 0.651, 0.04686), (4, 0.3534, 0.01289)])
def test_optimal_symmetric_steps_of_a_gaussian(bits, step, error):
    x = gaussian(1, 200_000)
    scale, zero = search_weight(x, bits=bits, granularity="tensor", calibration="mse")
    assert zero is None
    assert float(scale) == pytest.approx(step, rel=0.01)
    assert mse(x, bits=bits, granularity="tensor", calibration="mse") == pytest.approx(error, rel=0.02)


def test_optimal_eight_bit_step_of_a_gaussian():
    x = gaussian(1, 200_000)
    scale, _ = search_weight(x, bits=8, granularity="tensor", calibration="mse")
    assert float(scale) == pytest.approx(0.0308, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30), st.sampled_from([1, 3, 7]))
def test_the_breakpoint_sweep_finds_the_minimum(seed, n, top):
    x = gaussian(2, n, seed=seed).double()
    grid = x.abs().amax() * torch.linspace(0.01, 3, 4000).double()

    def error(step):
        return ((x[:, :, None] / step).round().clamp(-top, top) * step - x[:, :, None]).square().sum(1)

    best = error(exact_step(x, top)[:, None, None]).squeeze(-1)
    assert (best <= error(grid).amin(1) + 1e-9).all()


@settings(max_examples=25, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    calibration=st.sampled_from(get_args(WeightCalibration)),
    seed=st.integers(0, 50),
)
def test_every_grid_holds_zero_and_finer_grains_are_no_worse(bits, symmetric, calibration, seed):
    weight = gaussian(4, 24, seed=seed) * torch.tensor([[0.01], [1.0], [3.0], [0.2]])
    options = {"bits": bits, "symmetric": symmetric, "calibration": calibration}
    scale, zero = search_weight(weight, granularity="group", group_size=7, **options)
    assert scale.shape == (4, 4)
    assert (scale > 0).all()
    code = Affine.nearest(torch.zeros_like(weight), scale, bits=bits, zero_point=zero, group_size=7)
    assert (code.decode() == 0).all()
    if calibration == "mse" and symmetric:
        tensor, channel = (mse(weight, granularity=g, **options) for g in ("tensor", "channel"))
        tolerance = 1.0 if bits <= 4 else 1.02  # the grid of shrunk ranges is not the exact minimum
        assert channel <= tensor * tolerance + 1e-9
        assert channel <= mse(weight, granularity="channel", **options | {"calibration": "minmax"}) * tolerance


@pytest.mark.parametrize("calibration", get_args(WeightCalibration))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("constant", [0.0, 1e-38, 0.37, -0.37, 1e30])
def test_constant_and_dead_rows(calibration, symmetric, constant):
    weight = torch.full((3, 9), constant)
    scale, zero = search_weight(weight, bits=8, symmetric=symmetric, calibration=calibration)
    decoded = Affine.nearest(weight, scale, bits=8, zero_point=zero).decode()
    assert decoded.isfinite().all()
    assert (decoded - weight).abs().max() <= max(abs(constant) * 1e-6, 1e-30)
    assert constant != 0 or (scale == 1).all()


def test_minmax_reaches_the_extremes():
    weight = torch.tensor([[-1.0, 0.5, 3.0], [0.5, 1.0, 2.0], [-4.0, -2.0, -1.0]])
    scale, zero = search_weight(weight, bits=4, symmetric=True)
    assert zero is None
    assert scale.flatten().tolist() == pytest.approx([3 / 7, 2 / 7, 4 / 7])
    scale, zero = search_weight(weight, bits=4, symmetric=False)
    assert scale.flatten().tolist() == pytest.approx([4 / 15, 2 / 15, 4 / 15])
    assert zero.flatten().tolist() == [4, 0, 15]


def test_transposed_layers_have_a_scale_for_each_output_channel():
    weight = gaussian(5, 3, 2, 2)
    scale, _ = search_weight(weight, bits=8, axis=1)
    assert torch.allclose(scale[:, 0] * 127, weight.abs().amax((0, 2, 3)))


def test_percentiles():
    row = torch.arange(-100.0, 101.0)[None]
    assert [float(v) for v in percentile_range(row, 90, symmetric=False)] == [-80, 80]
    assert [float(v) for v in percentile_range(row, 50, symmetric=True)] == [-50, 50]
    assert [float(v) for v in percentile_range(row, 100, symmetric=False)] == [-100, 100]
    padded = torch.cat([row, torch.full((1, 50), math.nan)], dim=1)
    assert [float(v) for v in percentile_range(padded, 90, symmetric=False)] == [-80, 80]


def test_noise_falls_by_six_decibels_a_bit():
    x = torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = [mse(x, bits=b, granularity="tensor", symmetric=False) for b in range(3, 10)]
    steps = [10 * math.log10(a / b) for a, b in itertools.pairwise(noise)]
    assert steps == pytest.approx([6.02] * 6, abs=0.6)


def test_the_scale_of_levels_fits_scaled_levels_exactly():
    levels = torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0])
    true = torch.tensor([0.3, 2.0, 0.01])
    rows = true[:, None] * levels[torch.randint(0, 7, (3, 200), generator=torch.Generator().manual_seed(0))]
    assert torch.allclose(levels_scale(rows, levels), true, rtol=1e-5)
    assert (levels_scale(torch.zeros(2, 5), levels) == 1).all()


# ---------------------------------------------------------------------------------------------- streams


def observe(*batches, bins=8192):
    histogram = Histogram(bins)
    for batch in batches:
        histogram.observe(batch)
    return histogram


def test_a_histogram_counts_everything_while_its_reach_doubles():
    batches = [gaussian(1000, seed=i) * 10.0**i for i in range(-3, 4)]
    histogram = observe(*batches)
    assert histogram.counts.sum() == 7000
    assert histogram.low == min(float(b.min()) for b in batches)
    assert histogram.high == max(float(b.max()) for b in batches)
    whole = torch.cat(batches)
    at_once = torch.histc(whole.abs(), 4, 0, histogram.reach)
    merged = histogram.counts.reshape(8, -1).sum(1).float()
    assert torch.equal((merged + merged.flip(0))[4:], at_once)


def test_order_of_batches_does_not_change_the_range():
    batches = [gaussian(500, seed=i) * (i + 1) for i in range(4)]
    a, b = observe(*batches), observe(*reversed(batches))
    assert a.grid(bits=8) == b.grid(bits=8)


@pytest.mark.parametrize("calibration", ["minmax", "mse", "percentile"])
def test_inputs_without_negative_values_are_unsigned(calibration):
    histogram = observe(gaussian(10_000).relu(), gaussian(10_000, seed=1).relu() * 3)
    scale, zero = histogram.grid(bits=8, calibration=calibration)
    assert zero == 0
    assert 0 < scale <= histogram.high / 255 * 1.0001


def test_minmax_of_a_stream():
    histogram = observe(torch.tensor([1.0, 2.0]), torch.tensor([-0.5, 4.6]))
    scale, zero = histogram.grid(bits=8)
    assert scale == pytest.approx(5.1 / 255)
    assert zero == 25
    scale, zero = histogram.grid(bits=8, symmetric=True)
    assert (scale, zero) == (pytest.approx(4.6 / 127), 0)


def test_percentile_of_a_stream():
    histogram = observe(torch.rand(50_000, generator=torch.Generator().manual_seed(0)), torch.tensor([1000.0]))
    assert histogram.range("minmax", 0)[1] == 1000
    low, high = histogram.range("percentile", 99.0)
    assert low == 0
    assert high == pytest.approx(0.99, abs=0.25)


def test_mse_of_a_stream_clips_a_gaussian():
    histogram = observe(*(gaussian(50_000, seed=i) for i in range(4)))
    scale, zero = histogram.grid(bits=4, calibration="mse")
    assert scale == pytest.approx(0.3352, rel=0.03)
    assert zero in (7, 8)


@pytest.mark.parametrize("calibration", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("constant", [0.0, 2.5, -2.5])
def test_constant_streams(calibration, constant):
    histogram = observe(torch.full((10,), constant))
    scale, zero = histogram.grid(bits=8, calibration=calibration)
    assert scale > 0
    assert 0 <= zero <= 255
    code = min(max(round(constant / scale) + zero, 0), 255)
    assert (code - zero) * scale == pytest.approx(constant, rel=0.01)
    assert observe(torch.zeros(3), torch.full((3,), constant)).counts.sum() == 6


def test_activations_must_be_finite():
    with pytest.raises(ValueError, match="not finite"):
        observe(torch.tensor([1.0, math.inf]))
    with pytest.raises(ValueError, match="not finite"):
        observe(torch.tensor([1.0, math.nan]))
