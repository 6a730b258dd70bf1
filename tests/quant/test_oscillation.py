"""What is counted while a network is trained, and the penalty that keeps its weights uniform."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.quant.fakequant import LearnedWeight, quantize_weight
from qbench.quant.free_weights import free_weight
from qbench.quant.oscillation import Oscillation
from qbench.quant.penalties import kurtosis
from qbench.quant.recomputed import MsqeWeight
from qbench.quant.training import Step


def network(*quantizers: Any) -> nn.Sequential:
    layers = [nn.Linear(8, 8) for _ in quantizers]
    for layer, make in zip(layers, quantizers, strict=True):
        quantize_weight(layer, make(layer.weight.detach()))
    return nn.Sequential(*layers, nn.Linear(8, 2))


def learned(weight: Tensor) -> LearnedWeight:
    return LearnedWeight(weight, 3, "tensor")


def watch(model: nn.Module, steps: int, change: Any) -> dict[str, Any]:
    oscillation = Oscillation(model, {})
    for number in range(steps):
        with torch.no_grad():
            change(number)
        oscillation.see(Step(number, (number + 1) / steps, 0.0, model))
    return oscillation.record()


def test_flips_are_counted() -> None:
    model = network(lambda w: MsqeWeight(w, 4, "channel"), learned)

    def change(number: int) -> None:
        weight = free_weight(model[1])
        step = model[1].parametrizations.weight[0].scale.detach()
        weight[0, :3] = (0.4 if number % 2 else 0.6) * step[0, 0]
        model[0].parametrizations.weight[0].exponents[number % 8] += 1

    with torch.no_grad():
        change(1)
    record = watch(model, 20, change)
    assert record["steps"] == 20
    assert record["exponent_flips"] == {"0": 20}
    assert record["exponents"] == {"0": 8}
    assert record["codes"] == {"0": 64, "1": 64}
    assert record["pairs"] == 20
    assert record["code_flips"]["1"] == 3 * 20
    assert record["code_flips"]["0"] > 0


def test_long_trainings_are_looked_at_from_time_to_time() -> None:
    model = network(learned)
    weight, step = free_weight(model[0]), model[0].parametrizations.weight[0].scale.item()

    def change(number: int) -> None:
        weight[0, 0] = (0.4 if number % 2 else 0.6) * step

    record = watch(model, 450, change)
    assert record["steps"] == 450
    assert 180 <= record["pairs"] <= 201
    assert record["pairs"] - 1 <= record["code_flips"]["0"] <= record["pairs"]


def test_counting_goes_on_from_what_was_saved() -> None:
    model, memory = network(lambda w: MsqeWeight(w, 4, "tensor")), {}
    oscillation = Oscillation(model, memory)
    oscillation.see(Step(0, 0.5, 0.0, model))
    saved, again = copy.deepcopy(memory), {}
    resumed = Oscillation(model, again)
    again.update(saved)
    for part in (oscillation, resumed):
        part.see(Step(1, 1.0, 0.0, model))
    assert oscillation.record() == resumed.record()
    assert resumed.record()["steps"] == 2


def test_errors_are_compared_with_the_least() -> None:
    model = network(lambda w: MsqeWeight(w, 4, "tensor", power_of_two=False), learned)
    record = watch(model, 1, lambda number: None)
    assert record["error"]["0"] == pytest.approx(record["least_error"]["0"])
    assert record["error"]["1"] > 1.1 * record["least_error"]["1"]
    assert "2" not in record["error"]


def test_kurtosis_of_known_distributions() -> None:
    model = network(learned, learned)
    with torch.no_grad():
        for layer in model[:2]:
            free_weight(layer).copy_(torch.linspace(-1, 1, 64).reshape(8, 8))
    assert kurtosis(model).item() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        free_weight(model[0]).copy_(torch.tensor([-2.0, -1, 0, 0, 0, 0, 1, 2]).repeat(8, 1))
    assert kurtosis(model).item() == pytest.approx((4.25 / 1.25**2 - 1.8) ** 2 / 2, rel=0.01)
    kurtosis(model).backward()
    assert free_weight(model[0]).grad.abs().max() > 0
