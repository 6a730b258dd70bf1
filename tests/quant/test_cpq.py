"""Cluster-promoting quantization and DropBits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbench.quant.cpq import CpqInput, CpqWeight, promoted
from qbench.quant.dropbits import DropBitsWeight


def one(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def gradient(x: Tensor, scale: float = 0.5, sigma: float = 0.15, low: int = -4, high: int = 3) -> Tensor:
    x = x.clone().requires_grad_()
    promoted(x, one(scale), one(sigma), low, high).sum().backward()
    return x.grad


def test_the_value_is_the_nearest_grid_point() -> None:
    x = torch.randn(1000, dtype=torch.float64) * 2
    y = promoted(x, one(0.5), one(0.2), -4, 3)
    torch.testing.assert_close(y, (x / 0.5).round().clamp(-4, 3) * 0.5)


def test_the_gradient_is_zero_at_grid_points_and_odd_around_them() -> None:
    points = 0.5 * torch.arange(-4, 4, dtype=torch.float64)
    assert (gradient(points).abs() < 1e-12).all()
    for shift in (0.03, 0.1, 0.24):
        after, before = gradient(points + shift), gradient(points - shift)
        torch.testing.assert_close(after, -before)
        assert (after[points > 0] < 0).all(), "a larger number is less probably rounded to this point"


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), scale=st.floats(0.1, 1), sigma=st.floats(0.05, 1), bits=st.integers(2, 5))
def test_gradients_are_those_of_the_probability(seed: int, scale: float, sigma: float, bits: int) -> None:
    """Finite differences of `P(x, scale, sigma) * g(old scale) + P(old) * g(scale)`, where g = code * scale."""
    generator = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = (x / scale).round().clamp(low, high)

    def surrogate(x: Tensor, s: Tensor, width: Tensor) -> Tensor:
        above, below = (torch.sigmoid(((codes + side) * s - x) / width) for side in (0.5, -0.5))
        return ((above - below) * codes * scale + codes * s) @ weights

    arguments = (x, one(scale), one(sigma))
    own = [argument.clone().requires_grad_() for argument in arguments]
    (promoted(*own, low, high) @ weights).backward()
    for i, argument in enumerate(arguments):
        shift = 1e-6 * torch.randn(argument.shape, generator=generator, dtype=torch.float64)
        up, down = ([a + sign * shift if j == i else a for j, a in enumerate(arguments)] for sign in (1, -1))
        numeric = (surrogate(*up) - surrogate(*down)) / 2
        torch.testing.assert_close((own[i].grad * shift).sum(), numeric, rtol=1e-4, atol=1e-10)


def test_noise_begins_with_a_third_of_the_step() -> None:
    weight, quantizer = torch.randn(4, 6), CpqInput(4)
    quantizer(weight)
    for own in (CpqWeight(weight, 4), quantizer):
        torch.testing.assert_close(own.log_sigma.exp(), own.scale.detach() / 3)


def test_gradients_of_inputs_pass_inside_the_range_and_those_of_steps_are_as_of_weights() -> None:
    quantizer, x = CpqInput(2), torch.tensor([0.2, 0.6, 1.0, 3.4, 3.6, 9.0], requires_grad=True)
    quantizer(x.detach())
    quantizer.scale.data.fill_(1.0)
    upstream = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0, 6.0])
    quantizer(x).backward(upstream)
    torch.testing.assert_close(x.grad, torch.tensor([1.0, -2.0, 3.0, 4.0, 0.0, 0.0]))
    scale, sigma = (p.detach().clone().requires_grad_() for p in (quantizer.scale, quantizer.log_sigma))
    promoted(x.detach(), scale, sigma.exp(), 0, 3, quantizer.gain).backward(upstream)
    torch.testing.assert_close(quantizer.scale.grad, scale.grad)
    torch.testing.assert_close(quantizer.log_sigma.grad, sigma.grad)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8))
def test_with_all_masks_one_dropbits_is_cpq(seed: int, bits: int) -> None:
    weight = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = []
    for kind in (CpqWeight, DropBitsWeight):
        quantizer, own = kind(weight, bits).double(), weight.clone().requires_grad_()
        masks = [torch.ones(bits - 1, dtype=torch.float64)] if kind is DropBitsWeight else []
        y = quantizer.dropped(own, *masks) if masks else quantizer(own)
        y.square().sum().backward()
        found.append((y, own.grad, quantizer.scale.grad, quantizer.log_sigma.grad))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def brute_force(weight: Tensor, scale: float, sigma: float, masks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The most probable level with masks, and its probability in the distribution whose sum is what it was without."""
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64)
    needed = [max(1, (i if i >= 0 else -i - 1).bit_length() + 1) for i in map(int, levels)]
    kept = torch.cat([torch.ones(1, dtype=torch.float64), masks.cumprod(0)])[[k - 1 for k in needed]]
    mass = torch.sigmoid(((levels + 0.5) * scale - weight[:, None]) / sigma)
    mass = mass - torch.sigmoid(((levels - 0.5) * scale - weight[:, None]) / sigma)
    best = (mass * kept).argmax(1)
    chosen = (mass * kept).gather(1, best[:, None])[:, 0]
    return levels[best] * scale, chosen * mass.sum(1) / (mass * kept).sum(1)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), bits=st.integers(2, 5))
def test_dropping_agrees_with_all_levels_written_out(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(200, generator=generator, dtype=torch.float64)
    masks = torch.rand(bits - 1, generator=generator, dtype=torch.float64).mul(1.6).sub(0.3).clamp(0, 1)
    quantizer = DropBitsWeight(weight, bits).double()
    scale, sigma = quantizer.scale.item(), quantizer.log_sigma.exp().item()
    levels, _ = brute_force(weight, scale, sigma, masks, bits)
    own, drawn = weight.clone().requires_grad_(), masks.clone().requires_grad_()
    y = quantizer.dropped(own, drawn)
    torch.testing.assert_close(y, levels)
    y.sum().backward()
    free, other = weight.clone().requires_grad_(), masks.clone().requires_grad_()
    (brute_force(free, scale, sigma, other, bits)[1] * levels).sum().backward()
    torch.testing.assert_close(own.grad, free.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(drawn.grad, other.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("masks", [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 1.0, 0.5)])
def test_gradients_of_dropped_levels_keep_their_digits(masks: tuple[float, ...]) -> None:
    found = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        quantizer = DropBitsWeight(torch.randn(50), 4).to(dtype)
        weight = (torch.linspace(-9, 8, 60) * quantizer.scale.item()).to(dtype).requires_grad_()
        quantizer.dropped(weight, torch.tensor(masks, dtype=dtype)).sum().backward()
        found.append(weight.grad.double())
    exact, rounded = found
    assert (rounded - exact).norm() < 1e-3 * exact.norm()


def test_weights_beyond_the_grid_take_its_last_level() -> None:
    quantizer = DropBitsWeight(torch.randn(50), 4)
    far = torch.tensor([1e3, -1e3])
    scale = quantizer.scale.item()
    assert quantizer.dropped(far, torch.ones(3)).tolist() == pytest.approx([7 * scale, -8 * scale])
    y = quantizer.dropped(far.requires_grad_(), torch.tensor([1.0, 0.0, 1.0]))
    assert y.tolist() == pytest.approx([scale, -2 * scale]), "a bit is there only with all below it"
    y.sum().backward()
    assert far.grad.isfinite().all()


def test_in_evaluation_masks_are_what_is_more_probable() -> None:
    weight = torch.randn(500)
    quantizer = DropBitsWeight(weight, 4)
    with torch.no_grad():
        quantizer.logits.copy_(torch.tensor([3.0, -3.0, 3.0]))
    assert quantizer.training
    drawn = {quantizer(weight).unique().numel() for _ in range(50)}
    assert len(drawn) > 1
    quantizer.eval()
    quantized = quantizer(weight)
    assert quantizer.kept() == 2
    assert quantized.unique().numel() == 4
    encoding = quantizer.encoding(quantized)
    assert (encoding.low, encoding.high) == (-2, 1)
    quantizer.train().fix()
    assert torch.equal(quantizer(weight), quantized)


def test_the_cost_is_the_expected_number_of_masks() -> None:
    torch.manual_seed(0)
    quantizer = DropBitsWeight(torch.randn(5), 3)
    drawn = torch.stack([quantizer._masks() for _ in range(4000)]) > 0
    assert drawn.float().sum(1).mean().item() == pytest.approx(quantizer.cost().item(), abs=0.03)
