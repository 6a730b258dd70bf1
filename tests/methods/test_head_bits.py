"""Bit widths of heads: one step sets them for all that follow; edges of detectors are all layers that answer."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench import registry
from qbench.data import Batches, Data
from qbench.errors import Unsupported, UserError
from qbench.quant.activations import input_quantizers
from qbench.quant.heads import Heads, declare
from qbench.quant.layers import encodings, select_layers


class Toy(nn.Module):
    """Two maps; one head for each places boxes, one scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.box = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 1)) for _ in range(2))
        self.cls = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 6, 1)) for _ in range(2))
        outputs = tuple(f"{head}.{level}.1" for head in ("box", "cls") for level in (0, 1))
        declare(self, Heads(boxes=("box",), scores=("cls",), outputs=outputs))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        fine = self.stem(x).relu()
        maps = [fine, self.body(fine).relu()]
        return tuple(head(one) for heads in (self.box, self.cls) for head, one in zip(heads, maps, strict=True))


class Images:
    def __len__(self) -> int:
        return 4

    def batch(self, positions: Any) -> Tensor:
        return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))[list(positions)]


def run(network: nn.Module, *steps: str) -> nn.Module:
    reference = copy.deepcopy(network).eval()
    data = Data(Batches(Images(), torch.device("cpu"), 4), None, lambda *_: torch.zeros(()), reference=reference)
    for step in steps:
        network = registry.resolve("method", *registry.parse(step))(network, data)
    return network


def widths(network: nn.Module, *options: Any, **more: Any) -> dict[str, int]:
    return {name: bits for name, _, bits in select_layers(network, *options, **more)}


def test_edges_are_the_first_layer_and_all_that_answer() -> None:
    found = widths(Toy(), 4, 8)
    assert {name for name, bits in found.items() if bits == 8} == {"stem", "box.0.1", "box.1.1", "cls.0.1", "cls.1.1"}
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    assert widths(plain, 4, 8) == {"0": 8, "1": 4, "2": 8}


def test_heads_come_between_layer_bits_and_edge_bits() -> None:
    network = run(Toy(), "head_bits[boxes=8,scores=6]")
    found = widths(network, 4, 5, layer_bits={"box.1.0": 3})
    assert found["stem"] == 5
    assert found["body"] == 4
    assert (found["box.0.0"], found["box.0.1"], found["box.1.0"], found["cls.0.1"]) == (8, 8, 3, 6)
    assert "box.0.0" not in widths(network, 4, skip=("box",))
    assert widths(copy.deepcopy(network), 4) == widths(network, 4)


@pytest.mark.parametrize("method", ["rtn[bits=4]", "gptq[bits=4]", "kmeans[bits=4]", "brecq[bits=4,steps=2]"])
def test_every_method_follows(method: str) -> None:
    network = run(Toy(), "head_bits", method, "activations[bits=4]")
    bits = {
        name.removesuffix(".weight"): code.nominal_bits / code.decode().numel()
        for name, code in encodings(network).items()
    }
    assert bits["box.0.0"] > 7
    assert max(bits["body"], bits["cls.0.0"]) <= 4
    inputs = {name: quantizer.bits for name, quantizer in input_quantizers(network).items()}
    assert (inputs["box.0.1"], inputs["cls.0.1"]) == (8, 4)


def test_heads_can_stay_in_float() -> None:
    network = run(Toy(), "head_bits[boxes=32]", "rtn[bits=4]", "activations[bits=8]")
    names = {name.removesuffix(".weight") for name in encodings(network)} | input_quantizers(network).keys()
    assert not any(name.startswith("box") for name in names)
    assert "cls.0.0" in names


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(Unsupported, match="head_bits is for detectors"):
        run(nn.Sequential(nn.Conv2d(3, 4, 1)), "head_bits")
    with pytest.raises(UserError, match="neither boxes nor scores"):
        run(Toy(), "head_bits[boxes=null]")
    with pytest.raises(Unsupported, match=r"box.0.0 is to have 8 bits, and nf4 has 4"):
        run(Toy(), "head_bits", "nf4")
    with pytest.raises(Unsupported, match=r"box.0.0 is to have 8 bits, and apot has 7"):
        run(Toy(), "head_bits", "apot")
    with pytest.raises(UserError, match="mixed chooses the widths of all layers"):
        run(Toy(), "head_bits", "mixed")
