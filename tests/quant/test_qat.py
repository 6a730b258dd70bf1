"""What surrounds the quantizers: which layers get which, what is recorded, and that what is deployed was trained."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qbench.data import Batches, Data, Training
from qbench.models.base import cross_entropy
from qbench.quant.activations import StaticQuantizer, input_quantizers
from qbench.quant.encodings import Codebook
from qbench.quant.fakequant import keep_positive, quantize_weight, quantizers
from qbench.quant.layers import encodings
from qbench.quant.qat import quantizer_groups, train_quantized
from qbench.quant.schedule import Schedule
from qbench.quant.training import Step


class Noise:
    def __init__(self) -> None:
        self.images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, positions: Any) -> Tensor:
        return self.images[list(positions)]


class Binary(nn.Module):
    """The sign, times a learned scale."""

    def __init__(self, weight: Tensor, bits: int, axis: int) -> None:
        super().__init__()
        self.bits, self.axis = bits, axis
        self.scale = nn.Parameter(weight.abs().mean())

    def forward(self, weight: Tensor) -> Tensor:
        sign = torch.where(weight < 0, -1.0, 1.0)
        return (weight + (sign - weight).detach()) * self.scale

    def encoding(self, quantized: Tensor) -> Codebook:
        return Codebook.nearest(quantized, torch.stack([-self.scale, self.scale]).detach(), axis=self.axis)


class Clipped(nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.top = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        step = self.top / (2**self.bits - 1)
        y = torch.clamp(x, min=torch.zeros(()), max=self.top)
        return y + (self.fixed()(y.detach()) - y).detach() + 0 * step

    def fixed(self) -> StaticQuantizer:
        return StaticQuantizer(self.bits, False, self.top.item() / (2**self.bits - 1))

    def deployed(self) -> StaticQuantizer:
        return self.fixed()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )


def make_data() -> tuple[Data, dict[str, Any]]:
    noise, cpu, records = Noise(), torch.device("cpu"), {}
    training = Training(noise, [i % 4 for i in range(64)], cpu, None)
    return Data(Batches(noise, cpu), training, cross_entropy, record=records.__setitem__), records


def test_any_quantizers_are_attached_trained_recorded_and_deployed() -> None:
    data, records = make_data()
    seen: list[Step] = []
    model = train_quantized(
        network(),
        data,
        Schedule(steps=6, batch_size=16),
        Binary,
        Clipped,
        name="mine",
        bits=1,
        activation_bits=3,
        edge_bits=4,
        skip=("6",),
        on_step=seen.append,
    )
    assert set(encodings(model)) == {"0.weight", "2.weight"}
    assert {name: q.bits for name, q in input_quantizers(model).items()} == {"0": 4, "2": 3}
    assert all(type(quantizer) is StaticQuantizer for quantizer in input_quantizers(model).values())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert [step.done for step in seen] == pytest.approx([n / 6 for n in range(1, 7)])
    record = records["mine"]
    assert record["deployed_difference"] <= 1e-5
    assert record["steps"] == [0, 1, 2, 3, 4, 5, 6]
    assert set(record["state"]) == {f"{layer}.{end}" for layer in "02" for end in ("weight.scale", "input.top")}
    assert record["state"]["2.weight.scale"][0] == pytest.approx(network()[2].weight.abs().mean().item())
    assert all(len(values) == 7 and values[0] != values[-1] for values in record["state"].values())


def test_long_trainings_are_recorded_at_a_hundred_points() -> None:
    data, records = make_data()
    train_quantized(
        network(), data, Schedule(steps=250, batch_size=2), Binary, Clipped, name="mine", bits=1, activation_bits=None
    )
    assert len(records["mine"]["steps"]) == 101
    assert records["mine"]["steps"][-1] == 250


def test_parameters_of_quantizers_do_not_decay_and_learn_relatively_with_adamw() -> None:
    model = network()
    quantize_weight(model[2], Binary(model[2].weight.detach(), 1, 0))
    scale = model[2].parametrizations.weight[0].scale
    for optimizer in ("sgd", "adamw"):
        schedule = Schedule(optimizer=optimizer, lr=0.1, weight_decay=0.3)
        *others, own = quantizer_groups(schedule)(model)
        assert len(own["params"]) == 1
        assert own["params"][0] is scale
        assert own["weight_decay"] == 0
        assert own.get("lr", 0.1) == pytest.approx(0.1 if optimizer == "sgd" else 0.1 * scale.item())
        assert [len(group["params"]) for group in others] == [3, 5]


def test_scales_stay_positive() -> None:
    model = network()
    quantize_weight(model[2], Binary(-model[2].weight.detach(), 1, 0))
    (quantizer,) = quantizers(model).values()
    with torch.no_grad():
        quantizer.scale.neg_()
    twin = copy.deepcopy(model)
    keep_positive(model)
    assert quantizer.scale > 0
    assert twin[2].parametrizations.weight[0].scale < 0
