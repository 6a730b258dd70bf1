"""Heads that the maps of a pyramid share: one weight, and ranges of inputs for each map, under every kind of method."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qbench import registry
from qbench.data import Batches, Data, Training
from qbench.datasets.base import Boxes
from qbench.models.base import Model
from qbench.quant import packing
from qbench.quant.activations import input_quantizers
from qbench.quant.layers import encodings, select_layers
from qbench.quant.packing import Origin

OPTIONS = {"backbone": "test_resnet", "classes": 2, "size": 64, "width": 8, "random": 0}


class Images:
    def __len__(self) -> int:
        return 4

    def batch(self, positions: Any) -> Tensor:
        return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))[list(positions)]


@pytest.fixture(scope="module")
def model() -> Model:
    return registry.resolve("model", "retinanet", OPTIONS)()


def run(model: Model, *steps: str, network: nn.Module | None = None) -> nn.Module:
    network = network or model.load()
    reference = copy.deepcopy(network).eval()
    boxes = [Boxes(np.array([[8, 8, 40, 48]], dtype=np.float32), np.array([1]))] * 4
    cpu = torch.device("cpu")
    train = Training(Images(), boxes, cpu, None)
    data = Data(Batches(Images(), cpu, 4), train, model.loss, reference=reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a shared weight is quantized once
        for step in steps:
            network = registry.resolve("method", *registry.parse(step))(network, data)
    return network.eval()


METHODS = [
    ("rtn[bits=4,skip=[backbone]]", "activations[bits=8,skip=[backbone]]"),
    ("gptq[bits=4,skip=[backbone]]", "activations[bits=8,skip=[backbone]]", "bias_correct[skip=[backbone]]"),
    ("qdrop[bits=4,activation_bits=4,steps=1,skip=[backbone]]",),
    ("lsq[steps=2,batch_size=2,lr=0.001,skip=[backbone]]",),
]


@pytest.mark.parametrize("steps", METHODS, ids=lambda steps: steps[0].partition("[")[0])
def test_weights_are_one_and_every_map_has_its_range(model: Model, steps: tuple[str, ...], tmp_path: Path) -> None:
    network = run(model, *steps)
    tower: Any = [network.head.regression_head.conv[1][0], *(one.regression_head.conv[1][0] for one in network.shared)]
    assert all(layer.weight is tower[0].weight for layer in tower)
    layers = {name for name, _, _ in select_layers(network, 8, skip=("backbone",), for_inputs=True)}
    assert input_quantizers(network).keys() == layers
    assert len({float(layer.input_quantizer.scale) for layer in tower}) > 3
    packing.pack(network, tmp_path / "a.safetensors", Origin("retinanet", OPTIONS))
    loaded = packing.load(tmp_path / "a.safetensors")
    x = Images().batch([0, 1])
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(network(x), loaded(x), strict=True))
    assert {f"{name}.weight" for name in layers} == encodings(loaded).keys()


def test_training_sees_quantized_weights_on_every_map(model: Model) -> None:
    seen: list[bool] = []

    def look(layer: nn.Module, _inputs: Any, _output: Any) -> None:
        if layer.training and parametrize.is_parametrized(layer):
            seen.append(len(torch.unique(layer.get_parameter("parametrizations.weight.original"))) > 16)
            seen.append(len(torch.unique(layer.weight)) <= 16)  # type: ignore[arg-type]

    network: Any = model.load()
    for layer in (network.head.regression_head.conv[1][0], network.shared[3].regression_head.conv[1][0]):
        layer.register_forward_hook(look)
    run(model, "lsq[steps=2,batch_size=2,lr=0.001]", network=network)
    assert len(seen) == 8
    assert all(seen)
