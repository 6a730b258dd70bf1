"""Levels that are sums of numbers times signs, and what learns them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbench.quant.bases import fit_basis, levels_of, nearest_codes, refit
from qbench.quant.direct import DirectInput, DirectWeight, channel_mass


def error(points: Tensor, basis: Tensor, kind: str, mass: Tensor | None = None) -> Tensor:
    levels = levels_of(basis, kind)
    squared = (levels.gather(1, nearest_codes(points, levels)) - points).square()
    return (squared if mass is None else squared * mass).sum(1)


def test_the_levels_are_all_sums() -> None:
    basis = torch.tensor([[1.0, 3.0]])
    assert levels_of(basis, "signs").tolist() == [[-4, -2, 2, 4]]
    assert levels_of(basis, "bits").tolist() == [[0, 1, 3, 4]]


def test_one_bit_is_the_mean_magnitude() -> None:
    points = torch.randn(3, 100)
    torch.testing.assert_close(fit_basis(points, 1, "signs")[:, 0], points.abs().mean(1))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), bits=st.integers(1, 5), kind=st.sampled_from(["signs", "bits"]), n=st.integers(1, 60))
def test_taking_turns_never_adds_error(seed: int, bits: int, kind: str, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(3, n, generator=generator, dtype=torch.float64)
    points, mass = points.abs() if kind == "bits" else points, torch.rand(3, n, generator=generator).double()
    basis, errors = fit_basis(points, bits, kind, mass=mass, turns=0), []
    for _ in range(6):
        errors.append(error(points, basis, kind, mass))
        basis = refit(points, basis, kind, mass)
    assert (torch.stack(errors).diff(dim=0) <= 1e-6 * errors[0] + 1e-12).all()


def test_two_bits_are_better_than_equal_distances() -> None:
    points = torch.randn(1, 5000)
    start = fit_basis(points, 2, "signs", turns=0)
    assert error(points, fit_basis(points, 2, "signs"), "signs") < 0.995 * error(points, start, "signs")
    # Lloyd and Max found 0.1175 for four levels.
    assert error(points, fit_basis(points, 2, "signs"), "signs").item() / 5000 == pytest.approx(0.1175, rel=0.05)


def test_zeros_and_constants_have_levels() -> None:
    for points in (torch.zeros(1, 8), torch.ones(1, 8)):
        basis = fit_basis(points, 3, "signs")
        assert basis.isfinite().all()
        assert error(points, basis, "signs") < 1e-6


def test_a_weight_begins_with_its_nearest_levels_and_gradients_are_as_specified() -> None:
    weight = torch.randn(4, 50)
    quantizer = DirectWeight(weight, 2, "channel")
    levels = levels_of(quantizer.basis.detach(), "signs")
    torch.testing.assert_close(quantizer(weight), levels.gather(1, nearest_codes(weight, levels)))
    g = torch.randn(4, 50)
    with torch.no_grad():
        quantizer.latents[0, 0, 0] = 1.5
    quantizer(weight).backward(g)
    signs = quantizer.latents.detach().sign()
    torch.testing.assert_close(quantizer.basis.grad, (g * signs).sum(2).T / 50**0.5)
    expected = quantizer.basis.detach().T[:, :, None] * g
    expected[0, 0, 0] = 0  # outside [-1, 1]
    torch.testing.assert_close(quantizer.latents.grad, expected)
    quantizer.update(weight)
    assert quantizer.latents.abs().max() <= 1


def test_latents_are_near_zero_where_the_weight_is_halfway_between_two_levels() -> None:
    weight = torch.cat([torch.randn(1, 400), torch.zeros(1, 2)], dim=1)
    quantizer = DirectWeight(weight, 2)
    low, high = levels_of(quantizer.basis.detach(), "signs")[0].sort().values[-2:]
    near, at = (low + high) / 2 + 0.01 * (high - low), high
    again = DirectWeight(torch.cat([weight[:, :-2], torch.stack([near, at])[None]], dim=1), 2)
    nearest = again.latents.abs().amin(0)[0]
    assert nearest[-2] < 0.15
    assert nearest[-1] > 0.5


def test_errors_count_alike_whatever_the_channels_are_multiplied_with() -> None:
    """A channel and its quantized values are scaled: the normalised objective stays, the pooled one does not."""
    x, rounding = torch.randn(16, 3, 5, 5), 0.1 * torch.randn(16, 3, 5, 5)
    factor = torch.tensor([1.0, 10.0, 1.0]).reshape(1, 3, 1, 1)

    def objective(x: Tensor, q: Tensor) -> Tensor:
        return (channel_mass(x) * (x - q).square()).sum()

    torch.testing.assert_close(objective(factor * x, factor * (x + rounding)), objective(x, x + rounding))
    pooled = [(f * rounding).square().mean().item() for f in (1, factor)]
    assert pooled[1] > 10 * pooled[0]
    assert channel_mass(torch.ones(2, 3, 4, 4)).unique().tolist() == [1.0]
    x[:, 0] = 1
    assert [bool(mass) for mass in channel_mass(x).flatten()] == [False, True, True], "constants do not count"


def test_levels_of_inputs_serve_quiet_channels_and_follow_the_batches() -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 4, 6, 6) * torch.tensor([0.1, 0.1, 0.1, 5.0]).reshape(4, 1, 1)
    quantizer = DirectInput(3)
    y = quantizer(x)
    pooled = levels_of(fit_basis(x.flatten()[None], 3, "bits"), "bits")
    plain = pooled[0][nearest_codes(x.flatten()[None], pooled)].reshape(x.shape)
    assert (y - x)[:, 0].square().mean() < 0.2 * (plain - x)[:, 0].square().mean()
    before = quantizer.basis.clone()
    for _ in range(30):
        quantizer(3 * x)
    torch.testing.assert_close(quantizer.basis.sum(), 3 * before.sum(), rtol=0.15, atol=0)
    quantizer.eval()
    after = quantizer.basis.clone()
    quantizer(x)
    assert torch.equal(quantizer.basis, after)
    x.requires_grad_()
    quantizer.train()(torch.cat([x, x + 100])).sum().backward()
    assert set(x.grad.unique().tolist()) == {1.0}
