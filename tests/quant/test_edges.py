"""Sums, products and concatenations as modules: the function stays, operands can be quantized, files load back."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant import packing, structure
from qbench.quant.activations import StaticQuantizer, input_quantizers, quantize_input
from qbench.quant.edges import Edge, Join, edges, expose
from qbench.quant.outputs import OUTPUT
from qbench.registry import resolve

NETWORKS = {
    # Sums of blocks and one maximum pool, one average pool.
    "resnet18": (64, {"add": 8}),
    # Gates of squeeze-and-excitation are products.
    "mobilenetv3_small_050": (64, {"add": 7, "mul": 9}),
    "densenet121": (64, {"cat": 62}),
    "ghostnet_050": (64, {"add": 16, "cat": 32}),
    "test_vit": (160, {"add": 12}),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=5).eval().requires_grad_(False)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays(name: str) -> None:
    size, counts = NETWORKS[name]
    model, x = network(name), torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    fresh, names, answers = copy.deepcopy(model), list(model.state_dict()), model(x)
    expose(model, x[:1])
    joins = [module for module in model.modules() if isinstance(module, Join)]
    assert {kind: sum(join.kind == kind for join in joins) for kind in counts} == counts
    assert (model(x) - answers).abs().max() <= 1e-5 * answers.abs().max()
    assert list(model.state_dict()) == names

    structure.replay(fresh, structure.record(model))
    assert torch.equal(fresh(x), model(x))
    before = structure.record(model)
    expose(model, x[:1])
    assert structure.record(model) == before


def test_edges_are_what_is_read() -> None:
    model = network("resnet18")
    x = torch.randn(2, 3, 64, 64)
    expose(model, x[:1])
    assert {"maxpool", "global_pool.pool"} <= edges(model).keys()
    assert not any(name.startswith("layer1.0") for name in edges(model, ("layer1.0",)))
    seen: dict[str, Tensor] = {}
    for name, edge in edges(model).items():
        edge.register_forward_hook(lambda _m, inputs, _o, name=name: seen.__setitem__(name, inputs[0].clone()))
    block = model.layer1[0]
    inputs: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    model(x)
    assert torch.equal(seen["layer1.0.join0.edges.1"], inputs[0])
    total = seen["layer1.0.join0.edges.0"] + seen["layer1.0.join0.edges.1"]
    assert torch.equal(total.relu(), seen["layer1.1.join0.edges.1"])


def test_quantized_edges_are_loaded_back(tmp_path: object) -> None:
    model = resolve("model", "digits_resnet")().load()
    x = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model(x)
    expose(model, x[:1])
    structure.apply(model, "expose_output")
    assert torch.equal(model(x), before)
    for number, edge in enumerate(edges(model).values()):
        quantize_input(edge, StaticQuantizer(3, True, 0.1 + 0.01 * number))
    quantize_input(model.get_submodule(OUTPUT), StaticQuantizer(4, True, 0.5))
    path = tmp_path / "a"  # type: ignore[operator]
    packing.pack(model, path, packing.Origin("digits_resnet", {}))
    loaded = packing.load(path)
    assert torch.equal(loaded(x), model(x))
    assert not torch.allclose(model(x), before, atol=0.1)
    assert list(input_quantizers(loaded)) == [*edges(loaded), OUTPUT]
    assert set((loaded(x) * 2).frac().flatten().tolist()) == {0}
    assert sum(isinstance(edge, Edge) for edge in edges(loaded).values()) > 2


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.relu() if x.sum() > 0 else x * x.relu()


class _Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, x.relu(), alpha=2)


class _Gated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


@pytest.mark.parametrize(
    ("model", "reason"), [(_Branching(), "cannot be traced"), (_Scaled(), "that cannot be taken apart")]
)
def test_what_cannot_be_exposed_is_said(model: nn.Module, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        expose(model.eval(), torch.randn(1, 3, 4, 4))


def test_what_cannot_be_exposed_may_stay() -> None:
    model = nn.Sequential(_Scaled(), _Branching(), _Gated()).eval()
    x = torch.randn(1, 3, 4, 4)
    before = model(x)
    expose(model, x, every=False)
    assert list(edges(model)) == ["2.join0.edges.0", "2.join0.edges.1"]
    assert torch.equal(model(x), before)


def test_constants_and_parameters_are_no_edges() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale + 1).relu() * 2

    model = Plain().eval()
    expose(model, torch.randn(1, 3, 4, 4))
    assert structure.record(model) == []
    assert edges(model) == {}
