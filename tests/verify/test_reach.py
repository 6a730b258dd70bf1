"""Differences of a network and any quantized form of it: no sample is outside, and the program knows the greatest."""

import copy
from itertools import product

import pytest
import torch
from quantized import COLOUR, GREY, linear, quantize, residual, sample
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.activations import input_quantizer
from qbench.verify.chain import links, stages, twins
from qbench.verify.exact import Exact
from qbench.verify.graph import trace
from qbench.verify.ibp import FLOAT32
from qbench.verify.interval import Interval
from qbench.verify.reach import Reach, Reached, counterparts
from qbench.verify.verdict import largest


def reach(quantized: nn.Module, floats: nn.Module, low: Tensor, high: Tensor, unit: float = FLOAT32) -> Reach:
    """What is known of all inputs (B, ...) in a box; the last is of the outputs."""
    inputs = Interval(low.double(), high.double())
    graph = trace(quantized)
    found = Reach(counterparts(graph, trace(floats)), unit)
    with torch.no_grad():
        found.run(graph, Reached(inputs, inputs, Interval(0 * inputs.low, 0 * inputs.low)))
    return found


@pytest.mark.parametrize(("bits", "inputs"), [(8, False), (8, True), (3, False), (3, True)])
def test_no_sample_is_outside(bits: int, inputs: bool) -> None:
    """4,000 samples for each of 3 radii, of everything that is computed."""
    images = torch.randint(0, 256, (16, 3, 6, 6)).float()
    floats = residual(1)
    quantized = quantize(copy.deepcopy(floats), COLOUR.normalize(images), bits, inputs)
    for radius in (0, 2, 30):
        low, high = (images[:1] - radius).clamp(min=0), (images[:1] + radius).clamp(max=255)
        found = reach(quantized, floats, COLOUR.normalize(low), COLOUR.normalize(high)).seen["last"]
        x = COLOUR.normalize(sample(low[0], high[0], 4000))
        with torch.no_grad():
            own, other = quantized(x), floats(x)
        for values, interval in ((other, found.floats), (own, found.quantized), (own - other, found.difference)):
            assert (values.double() >= interval.low - 1e-6).all()
            assert (values.double() <= interval.high + 1e-6).all()
        if radius == 30 and bits == 8:  # they say more than the bounds of both networks do
            assert largest(found.difference) < 0.5 * largest(found.quantized.minus(found.floats))


def test_a_network_does_not_differ_from_itself() -> None:
    images = torch.randint(0, 256, (2, 3, 6, 6)).float()
    floats = residual(1)
    low, high = (COLOUR.normalize(images + change) for change in (-20, 20))
    difference = reach(copy.deepcopy(floats), floats, low, high, unit=0.0).seen["last"].difference
    assert (difference.low == 0).all()
    assert (difference.high == 0).all()


def test_finer_steps_have_smaller_differences() -> None:
    images = torch.randint(0, 256, (16, 3, 6, 6)).float()
    floats, low = residual(1), COLOUR.normalize(images[:1])
    sizes = []
    for bits in (3, 5, 7, 9, 12):
        quantized = quantize(copy.deepcopy(floats), COLOUR.normalize(images), bits, inputs=False)
        sizes.append(largest(reach(quantized, floats, low, low).seen["last"].difference))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.01 * sizes[0]


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("sizes", [(2, 3, 2), (2, 4, 3, 1), (2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_the_program_finds_the_greatest_difference_of_all(sizes: tuple[int, ...], seed: int, inputs: bool) -> None:
    images = torch.randint(0, 256, (64, 1, 1, 2)).float()
    floats = linear(seed, *sizes, size=4.0)
    quantized = quantize(copy.deepcopy(floats), GREY.normalize(images), 3, inputs)
    low, high = torch.tensor([20.0, 100.0]), torch.tensor([51.0, 131.0])
    grid = torch.cartesian_prod(*(torch.arange(a, b + 1) for a, b in zip(low.tolist(), high.tolist(), strict=True)))
    with torch.no_grad():
        x = GREY.normalize(grid.view(-1, 1, 1, 2))
        every = (quantized(x) - floats(x)).double()
    ends = (GREY.normalize(end.view(1, 1, 1, 2)) for end in (low, high))
    found = reach(quantized, floats, *ends)
    chain = links(trace(quantized))
    both = twins(chain, found.counterparts, GREY)
    known = stages(chain, found.seen)
    program = Exact(both, low.double(), high.double(), known)
    for output, sign in product(range(sizes[-1]), (-1, 1)):
        bound, pixels = program.greatest(output, sign, seconds=30)
        assert bound == pytest.approx(float((sign * every[:, output]).max()), abs=1e-4)
        ends = known[-1].difference
        assert bound <= float(ends.high[output] if sign > 0 else -ends.low[output]) + 1e-4
        assert (torch.from_numpy(pixels) >= low).all()
        assert (torch.from_numpy(pixels) <= high).all()


def test_quantizers_with_signs_and_zero_points_occur() -> None:
    images = torch.randint(0, 256, (64, 3, 6, 6)).float()
    model = quantize(residual(1), COLOUR.normalize(images), 3)
    kinds = [
        (q.symmetric, int(q.zero_point) != 0) for q in map(input_quantizer, (model.first, model.second, model.last))
    ]
    assert kinds == [(False, True), (False, False), (False, False)]


def test_other_structures_are_refused() -> None:
    floats = linear(0, 4, 3, 2)
    with pytest.raises(Unsupported, match="float network has nothing like 2: structures differ"):
        counterparts(trace(linear(0, 4, 3, 3, 2)), trace(nn.Sequential(*list(floats)[:2])))
    with pytest.raises(Unsupported, match="quantized network has nothing like 3: structures differ"):
        counterparts(trace(nn.Sequential(*list(floats)[:3])), trace(floats))
    for other in (
        residual(),
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()),
    ):
        with pytest.raises(Unsupported, match="exact program is for"):
            links(trace(other.eval()))
