"""Steps that are recomputed from weights, rounded to powers of two, and kept from oscillating."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from qbench.quant.fakequant import LearnedWeight, quantize_weight
from qbench.quant.free_weights import update_quantizers
from qbench.quant.powers import PowerWeight, settled
from qbench.quant.recomputed import MsqeWeight, RecomputedWeight
from qbench.quant.step_search import best_step, squared_error


def test_the_largest_weight_has_the_largest_code() -> None:
    weight = torch.tensor([[0.5, -1.4], [3.0, 0.1]])
    assert RecomputedWeight(weight, 4, "channel").scale.flatten().tolist() == pytest.approx([0.2, 3 / 7])
    tensor = RecomputedWeight(weight, 4, "tensor")
    assert tensor.scale.shape == (1, 1)
    assert tensor(weight).amax() == pytest.approx(3.0)
    tensor.update(2 * weight)
    assert tensor.scale.item() == pytest.approx(6 / 7)


def test_gradients_pass_inside_the_range_only() -> None:
    quantizer = MsqeWeight(torch.randn(4, 100), 3, "tensor", power_of_two=False)
    edge = 3 * quantizer.scale.item()
    weight = torch.tensor([[-edge - 0.1, -edge + 0.1, 0.0, edge - 0.1, edge + 0.1]], requires_grad=True)
    quantizer(weight).sum().backward()
    assert weight.grad.tolist() == [[0, 1, 1, 1, 0]]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_msqe_has_the_steps_of_least_error_and_follows_them(bits: int) -> None:
    weight, top = torch.randn(3, 500), 2 ** (bits - 1) - 1
    exact = MsqeWeight(weight, bits, "channel", power_of_two=False)
    torch.testing.assert_close(exact.scale.flatten(), best_step(weight, -top, top))
    exact.update(1.5 * weight)
    torch.testing.assert_close(exact.scale.flatten(), 1.5 * best_step(weight, -top, top))
    turns = MsqeWeight(weight, bits, "channel", power_of_two=False, search="alternating")
    for _ in range(10):
        turns.update(1.02 * weight)
    own, least = (
        squared_error(1.02 * weight, s, -top, top) for s in (turns.scale.flatten(), exact.found(1.02 * weight))
    )
    assert (own <= 1.02 * least).all()


def test_of_the_powers_of_two_the_one_with_the_least_error_is_taken() -> None:
    generator = torch.Generator().manual_seed(1)
    not_nearest = 0
    for _ in range(60):
        weight = torch.randn(1, 40, generator=generator) * (1 + torch.rand(1, generator=generator))
        quantizer = MsqeWeight(weight, 3, "tensor")
        power = quantizer.scale.flatten()
        assert power.log2() == power.log2().round()
        errors = {k: squared_error(weight, power * 2.0**k, -3, 3).item() for k in (-2, -1, 0, 1, 2)}
        assert min(errors, key=errors.__getitem__) == 0
        not_nearest += bool(power.log2() != best_step(weight, -3, 3).log2().round())
    assert not_nearest, "rounding the logarithm would do as well"


def test_momentum_and_hysteresis_keep_a_power_of_two_where_it_is() -> None:
    weight, flips = torch.randn(1, 2000), {}
    powers = [MsqeWeight(2 ** (k / 40) * weight, 4, "tensor").scale.item() for k in range(41)]
    at = 2 ** (powers.count(powers[0]) / 40)  # here the best power of two changes
    for name, options in {"none": {}, "both": {"momentum": 0.9, "hysteresis": 0.1}}.items():
        quantizer, flips[name] = MsqeWeight(at * weight, 4, "tensor", **options), 0
        for step in range(40):
            before = quantizer.scale.clone()
            quantizer.update(at * weight * (1 + 0.04 * math.sin(step)))
            flips[name] += int((quantizer.scale != before).sum())
    assert flips["none"] >= 4
    assert flips["both"] == 0
    for _ in range(40):
        quantizer.update(at * weight * 4)
    assert quantizer.scale > before, "it does follow a step that has left for good"


def test_frozen_steps_stay() -> None:
    weight = torch.randn(1, 200)
    quantizer = MsqeWeight(weight, 4, "tensor")
    quantizer.frozen = True
    before = quantizer.scale.clone()
    quantizer.update(8 * weight)
    assert torch.equal(quantizer.scale, before)


def test_settled_exponents() -> None:
    exponents, nearest = torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])
    logarithms = torch.tensor([0.55, 0.65, -0.65])
    assert torch.equal(settled(exponents, nearest, logarithms, 0.0), nearest)
    assert settled(exponents, nearest, logarithms, 0.1).tolist() == [0, 1, 1]


def test_the_gradient_of_the_logarithm_is_that_of_the_step_times_the_step_and_ln_2() -> None:
    weight = torch.randn(1, 300)
    quantizer = PowerWeight(weight, 4, "tensor")
    quantizer(weight).square().sum().backward()
    assert quantizer.log_scale.grad.abs() == pytest.approx(1.0), "the first gradient is normalised to 1"
    plain = LearnedWeight(weight, 4, "tensor", narrow=True)
    with torch.no_grad():
        plain.scale.copy_(quantizer.scale)
    plain.gain = 1.0
    plain(weight).square().sum().backward()
    raw = plain.scale.grad * plain.scale * math.log(2)
    assert quantizer.log_scale.grad.sign() == raw.sign()
    torch.testing.assert_close(quantizer.mean_square, 0.01 * raw.square())


def test_normalised_gradients_let_the_step_find_the_least_error() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 1000)
    quantizer = PowerWeight(4 * weight, 4, "tensor")
    assert quantizer.scale.item() >= 1
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (quantizer(weight) - weight).square().mean().backward()
        optimizer.step()
        quantizer.update(weight)
    assert quantizer.scale.item() in (0.25, 0.5)  # the best step is 0.35


def test_updates_reach_the_quantizers_of_a_network() -> None:
    layer: nn.Module = nn.Linear(20, 20)
    quantize_weight(layer, MsqeWeight(layer.weight.detach(), 4, "tensor"))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(4)
    update_quantizers(layer)

    def scale(of: nn.Module) -> Tensor:
        return of.parametrizations.weight[0].scale

    assert scale(layer) == 4 * scale(twin)
