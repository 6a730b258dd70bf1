"""Exposed sums: the function stays, what is added can be quantized, and artifacts are rebuilt."""

import copy

import pytest
import timm
import torch
from torch import nn

from qbench.quant import packing, structure
from qbench.quant.activations import StaticQuantizer, input_quantizers, quantize_input
from qbench.quant.outputs import OUTPUT
from qbench.quant.sums import Sum, expose_sums
from qbench.registry import resolve

NETWORKS = {"resnet18": 8, "mobilenetv2_100": 10, "efficientnet_b0": 9, "convnext_atto": 12}


def sums(model):
    return [name for name, module in model.named_modules() if isinstance(module, Sum)]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays(name):
    model = timm.create_model(name, pretrained=False, num_classes=5).eval().requires_grad_(False)
    fresh, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    answers = model(x)
    expose_sums(model, x[:1])
    assert len(sums(model)) == NETWORKS[name]
    assert torch.equal(model(x), answers)

    structure.replay(fresh, structure.record(model))
    assert torch.equal(fresh(x), answers)
    assert torch.equal(copy.deepcopy(model)(x), answers)

    before = structure.record(model)
    expose_sums(model, x[:1])
    assert structure.record(model) == before


class Block(nn.Module):
    """Adds activations, a parameter, a number, and a constant that it makes."""

    def __init__(self, makes=False):
        super().__init__()
        self.shift, self.makes = nn.Parameter(torch.ones(3)), makes

    def forward(self, x):
        if self.makes:
            return x + torch.ones(3) * x
        return (x + 1 + self.shift) + x.relu()


def test_only_activations_are_exposed():
    model = Block().eval()
    expose_sums(model, torch.randn(1, 3))
    quantize_input(model.get_submodule("sum0.right"), StaticQuantizer(8, False, 1.0))
    assert sums(model) == ["sum0"]
    assert torch.equal(model(torch.tensor([[-0.6, 0.6, 2.4]])), torch.tensor([[1.4, 3.6, 6.4]]))


def test_what_cannot_be_rewritten_is_left_alone():
    model, x = Block(makes=True).eval(), torch.randn(1, 3)
    expose_sums(model, x)
    assert not sums(model)
    assert not structure.record(model)


def test_quantized_sums_and_outputs_are_loaded_back(tmp_path):
    model = resolve("model", "digits_resnet")().load()
    x = torch.randn(3, 1, 32, 32)
    before = model(x)
    expose_sums(model, x[:1])
    structure.apply(model, "expose_output")
    assert torch.equal(model(x), before)
    places = [*(f"{name}.left" for name in sums(model)), OUTPUT]
    for place in places:
        quantize_input(model.get_submodule(place), StaticQuantizer(4, True, 0.5))
    packing.pack(model, tmp_path / "a", packing.Origin("digits_resnet", {}))
    loaded = packing.load(tmp_path / "a")
    assert list(input_quantizers(loaded)) == places
    assert torch.equal(loaded(x), model(x))
    assert set((loaded(x) * 2).frac().flatten().tolist()) == {0}
