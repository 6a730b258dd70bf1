"""The difference of a network and its fixed-point form: the reference's answers, and that no sample is outside."""

from functools import partial
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qbench.errors import Unsupported, UserError
from qbench.verify.differences import activation_difference, propagate
from qbench.verify.exact import Exact, fixed_point
from qbench.verify.fixed_point import FixedPoint, Layer, answer, away, layers_of
from qbench.verify.interval import Interval
from qbench.verify.verdict import difference_at, search, verify

ROUNDED = 1e-9


def network(seed: int, *sizes: int, size: float = 1.0) -> list[Layer]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [Layer(size * draw(n, d) / d**0.5, 0.3 * draw(n)) for d, n in pairwise(sizes)]


def box(seed: int, d: int, radius: int) -> tuple[Tensor, Tensor]:
    centre = torch.randint(0, 256, (d,), generator=torch.Generator().manual_seed(seed))
    return (centre - radius).clamp(min=0), (centre + radius).clamp(max=255)


def test_the_transformer_of_the_reference(shared: Path) -> None:
    with np.load(shared / "golden" / "baselines.npz") as golden:
        l, u, lq, uq, dl, du, top = torch.from_numpy(golden["dra_in_l_u_lq_uq_dl_du_t"]).unbind(1)  # noqa: E741
        wanted = torch.from_numpy(golden["dra_out_lo_hi"])
    found = activation_difference(Interval(l, u), Interval(lq, uq), Interval(dl, du), top)
    # The reference computes in float32.
    torch.testing.assert_close(torch.stack([found.low, found.high], 1), wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_the_transformer_is_sound(seed: int) -> None:
    """For 400 configurations, 100 values each that keep to all three intervals."""
    generator = torch.Generator().manual_seed(seed)
    n, top = 3 * torch.randn(400, 100, generator=generator, dtype=torch.float64), 1.5
    n = n.mean(1, keepdim=True) + n * torch.rand(400, 1, generator=generator)
    apart = torch.randn(400, 1, generator=generator) + torch.randn(400, 100, generator=generator, dtype=torch.float64)
    fixed, apart = n + apart, apart.double()
    intervals = [Interval(values.amin(1), values.amax(1)) for values in (n, fixed, apart)]
    found = activation_difference(*intervals, top)
    difference = fixed.clamp(0, top) - n.relu()
    assert (difference >= found.low[:, None] - ROUNDED).all()
    assert (difference <= found.high[:, None] + ROUNDED).all()


@pytest.mark.parametrize("bits", [4, 6, 8, 10])
@pytest.mark.parametrize("sizes", [(5, 3), (6, 8, 3), (4, 6, 5, 3), (8, 20, 20, 20, 2)])
def test_no_sample_is_outside(bits: int, sizes: tuple[int, ...]) -> None:
    for seed, radius in product(range(5), (0, 3, 60, 255)):
        layers, form = network(seed, *sizes, size=2.0), FixedPoint(bits)
        low, high = box(seed, sizes[0], radius)
        bound = propagate(layers, form, low, high)[-1].difference
        pixels = low + (torch.rand(1000, sizes[0], dtype=torch.float64) * (high - low + 1)).floor()
        difference = form.answer(form.quantize(layers), pixels) - answer(layers, pixels)
        assert (difference >= bound.low - ROUNDED).all()
        assert (difference <= bound.high + ROUNDED).all()
        if radius == 0:  # a single input: what is left is what the proof does not know of the rounding
            assert (bound.high - bound.low < 2.0 ** (9 - bits)).all()


def test_weights_on_the_grid_leave_only_what_activations_and_inputs_are_rounded_by() -> None:
    low, high = torch.zeros(6, dtype=torch.float64), torch.full((6,), 255.0, dtype=torch.float64)
    coarse = FixedPoint(6).quantize(network(0, 6, 8, 3, size=0.3))
    widths = []
    for bits in (6, 8, 10, 12, 16):
        form = FixedPoint(bits)
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(form.quantize(coarse), coarse, strict=True))
        bound = propagate(coarse, form, low, high)[-1].difference
        first, second = (layer.weight.abs() for layer in coarse)
        most = second @ (form.half + first.sum(1) / 256)
        assert (torch.maximum(bound.high, -bound.low) <= most + ROUNDED).all()
        widths.append(bound.high - bound.low)
    scaling = second @ (first.sum(1) / 256)
    assert (widths[-1] <= scaling * 1.01 + 0.01).all()
    assert all((finer <= coarser).all() for coarser, finer in pairwise(widths))


def test_the_search_nearly_finds_the_greatest_difference_of_all() -> None:
    low, high = torch.tensor([20, 100]), torch.tensor([51, 131])
    grid = torch.cartesian_prod(*(torch.arange(a, b + 1, dtype=torch.float64) for a, b in zip(low, high, strict=True)))
    for seed in range(10):
        layers, form = network(seed, 2, 5, 2), FixedPoint(5)
        every = form.answer(form.quantize(layers), grid) - answer(layers, grid)
        difference = partial(difference_at, layers, form)
        pixels = search(difference, low.double(), high.double(), samples=100, steps=20, seed=seed)
        found = difference(pixels)
        assert (pixels == pixels.round()).all()
        assert (pixels >= low).all()
        assert (pixels <= high).all()
        bound = propagate(layers, form, low, high)[-1].difference
        assert (bound.low - ROUNDED <= every.amin(0)).all()
        assert (every.amax(0) <= bound.high + ROUNDED).all()
        assert (every.amin(0) <= found.amin(0)).all()
        assert (found.amax(0) <= every.amax(0)).all()
        assert found.abs().max() >= 0.9 * every.abs().max()


def test_verdicts() -> None:
    layers = network(1, 4, 6, 3)
    low, high = box(1, 4, 10)
    verdict = verify(layers, 6, low, high, epsilon=1.0)
    upper = float(torch.maximum(-verdict.proved.low, verdict.proved.high).max())
    lower = float(torch.maximum(-verdict.found.low, verdict.found.high).max())
    assert 0 < lower < upper
    states = {e: verify(layers, 6, low, high, epsilon=e).state for e in (1.01 * upper, (lower + upper) / 2, lower)}
    assert list(states.values()) == ["proved", "open", "falsified"]
    form = FixedPoint(6)
    witnessed = form.answer(form.quantize(layers), verdict.witness) - answer(layers, verdict.witness)
    assert float(witnessed.abs().max()) == lower


@pytest.mark.parametrize("sizes", [(2, 3, 2), (2, 4, 3, 1), (2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_the_program_finds_the_greatest_difference_of_all(sizes: tuple[int, ...], seed: int) -> None:
    low, high = torch.tensor([20.0, 100.0]).double(), torch.tensor([51.0, 131.0]).double()
    grid = torch.cartesian_prod(*(torch.arange(a, b + 1).double() for a, b in zip(low, high, strict=True)))
    # Large weights, so that ReLU, both ends of the clamps and none of them occur.
    layers, form = network(seed, *sizes, size=4.0), FixedPoint(4)
    every = difference_at(layers, form, grid)
    program = Exact(fixed_point(layers, form), low, high, propagate(layers, form, low, high))
    for output, sign in product(range(sizes[-1]), (-1, 1)):
        bound, pixels = program.greatest(output, sign, seconds=30)
        assert bound == pytest.approx(float((sign * every[:, output]).max()), abs=1e-5)
        reached = sign * difference_at(layers, form, torch.from_numpy(pixels))[output]
        assert float(reached) == pytest.approx(bound, abs=1e-5)


def test_the_program_decides_what_intervals_do_not() -> None:
    layers = network(1, 2, 3, 2)
    low, high = torch.tensor([20, 100]), torch.tensor([80, 131])
    rough = verify(layers, 5, low, high, epsilon=1e-9)
    upper, lower = (float(torch.maximum(-i.low, i.high).max()) for i in (rough.proved, rough.found))
    verdict = verify(layers, 5, low, high, epsilon=0.5 * (upper + lower), seconds=60)
    assert (verdict.state, verdict.by_intervals) == ("proved", False)
    assert (verdict.proved.high <= rough.proved.high).all()
    assert verify(layers, 5, low, high, epsilon=0.5 * (upper + lower), seconds=1e-9).state == "open"


def test_networks_are_read_from_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, 2, bias=False))
    pixels = torch.randint(0, 256, (7, 1, 2, 2)).float()
    torch.testing.assert_close(answer(layers_of(model), pixels.flatten(1).double()).float(), model(pixels / 255))
    linear = nn.Linear(2, 2)
    for other in (nn.Sequential(linear, linear), nn.Sequential(linear, nn.ReLU()), nn.Conv2d(1, 1, 1)):
        with pytest.raises(Unsupported, match="ReLU between"):
            layers_of(other)


def test_rounding_is_away_from_zero_and_ranges_end() -> None:
    assert away(torch.tensor([0.5, -0.5, 1.5, 2.4, -2.5])).tolist() == [1, -1, 2, 2, -3]
    form = FixedPoint(4)
    (layer,) = form.quantize([Layer(torch.tensor([[0.99, -2.0, 0.0625]]).double(), torch.tensor([1.99]).double())])
    assert layer.weight.tolist() == [[0.875, -1.0, 0.125]]
    assert layer.bias.tolist() == [1.75]
    assert form.top == 3.75


def test_boxes_and_bits_are_checked() -> None:
    layers = network(0, 2, 2)
    with pytest.raises(UserError, match="3 bits"):
        verify(layers, 2, torch.zeros(2), torch.ones(2), epsilon=1.0)
    for low, high in ((1.0, 0.0), (-1.0, 3.0), (3.0, 256.0), (0.5, 3.0)):
        with pytest.raises(UserError, match="0 to 255"):
            verify(layers, 4, torch.full((2,), low), torch.full((2,), high), epsilon=1.0)
