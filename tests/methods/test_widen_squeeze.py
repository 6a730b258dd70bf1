"""Widening and squeezing: what it is without either, what is removed, and what is recorded."""

from typing import Any

import pytest
import torch
from embedded import Digits
from test_lsq import make_data
from torch import nn

from qbench.errors import Unsupported
from qbench.methods.lsq import lsq
from qbench.methods.widen_squeeze import widen_squeeze
from qbench.quant.matching import add_projections, distance, drop_projections
from qbench.quant.schedule import Schedule


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits("digits_resnet", tmp_path_factory.mktemp("digits"))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Conv2d(10, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip


SCHEDULE = Schedule(steps=5, batch_size=16, optimizer="adamw", lr=0.001)
FOUR_BITS: dict[str, Any] = {"bits": 4, "activation_bits": 4, "schedule": SCHEDULE}


def test_without_widening_and_squeezing_it_is_plain_training() -> None:
    plain = lsq(network(), make_data()[0], granularity="channel", **FOUR_BITS)
    same = widen_squeeze(network(), make_data()[0], factor=1, penalty=0, matching=0, **FOUR_BITS)
    assert plain.state_dict().keys() == same.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), same.state_dict().values(), strict=True))


def test_inner_layers_are_widened_and_their_copies_differ() -> None:
    data, _, _ = make_data(network())
    model = widen_squeeze(network(), data, factor=3, penalty=0, **FOUR_BITS)
    # The first layer is an edge.
    assert [model[i].weight.shape[0] for i in (0, 3, 6)] == [8, 30, 18]
    first, second, third = model[3].weight.split(10)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not any("projection" in name for name, _ in model.named_modules())


def test_the_channels_with_the_smallest_gates_go() -> None:
    data, _, records = make_data(network())
    model = widen_squeeze(network(), data, factor=2, removed=0.5, **FOUR_BITS)
    kept = {name: entry["kept"] for name, entry in records["channels"].items()}
    assert kept == {"4": len(model[4].weight), "7": len(model[7].weight)}
    assert 16 <= sum(kept.values()) <= 18
    assert kept["4"] >= 5
    assert kept["7"] >= 3
    assert len(records["training"]["loss"]) == 5
    assert records["widen_squeeze"]["deployed_difference"] <= 1e-6


def test_a_strong_penalty_makes_gates_small() -> None:
    gates = []
    for penalty in (1e-9, 1.0):
        data, _, _ = make_data(network())
        schedule = SCHEDULE.model_copy(update={"steps": 20, "optimizer": "sgd", "lr": 0.02})
        model = widen_squeeze(
            network(), data, penalty=penalty, matching=0, removed=0.0, bits=4, activation_bits=4, schedule=schedule
        )
        gates.append(model[4].weight.abs().mean().item())
    assert gates[1] < 0.96 * gates[0]


def test_projections_start_as_the_mean_of_copies_and_learn() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6))
    add_projections(model, {"0": 2}, 3)
    wanted = torch.randn(4, 2, 5, 5)
    copies = torch.cat([wanted + shift for shift in (-1, 0, 1)], 1)
    assert distance(model, {"0": copies}, {"0": wanted}) < 1e-12
    apart = distance(model, {"0": copies + 1}, {"0": wanted})
    assert apart.item() == pytest.approx(1 / wanted.square().mean().item(), rel=1e-5)
    apart.backward()
    assert model[0].feature_projection.weight.grad.any()
    drop_projections(model)
    assert not list(model[0].children())


def test_what_is_not_supported_is_said() -> None:
    data, _, _ = make_data()
    with pytest.raises(Unsupported, match="no batch norm is read by convolutions alone"):
        widen_squeeze(
            nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Linear(8, 4)).eval(), data, bits=4, activation_bits=4
        )
    with pytest.raises(Unsupported, match="no float network whose features"):
        widen_squeeze(network(), data, **FOUR_BITS)


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "penalty"), [(2, 0.0), (2, 1e-4)])
def test_a_binary_network_keeps_most_of_the_accuracy(digits: Digits, factor: int, penalty: float) -> None:
    network = digits.trained("widen_squeeze", factor=factor, penalty=penalty, steps=120, batch_size=64, lr=0.005)
    assert digits.accuracy(network) > 0.75 * digits.accuracy(digits.space.model.load().eval())


def test_four_bits_keep_most_of_the_accuracy(digits: Digits) -> None:
    network = digits.trained("widen_squeeze", bits=4, activation_bits=4, steps=30, batch_size=32, lr=0.001)
    assert digits.accuracy(network) > 0.75 * digits.accuracy(digits.space.model.load().eval())
