"""Artifacts: what is loaded is what was packed; what is not what it claims is refused."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from qbench import registry
from qbench.errors import UserError
from qbench.quant import packing, structure
from qbench.quant.activations import DynamicQuantizer, StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine, Cast, Codebook, Sum
from qbench.quant.layers import encode, encodings, weight_layers

PLUGIN = """
from torch import nn
from qbench import model
from qbench.models.base import Model, Preprocess

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight
    def forward(self, x):
        x = self.bn(self.conv(x)).relu().mean((2, 3))
        return self.c(self.b(self.a(x)))

@model("packing_net")
def packing_net():
    return Model("classification", Net, None, Preprocess((8, 8), mean=(0.5,), std=(0.5,)))
"""


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> packing.Origin:
    path = tmp_path_factory.mktemp("plugin") / "packing_plugin.py"
    path.write_text(PLUGIN)
    registry.load_file(path)
    return packing.Origin("packing_net", {}, (str(path),))


@pytest.fixture
def model(origin) -> nn.Module:
    torch.manual_seed(0)
    net = registry.resolve("model", "packing_net")().build().eval()
    net.bn.running_mean.normal_()
    return net


def check_equal(model: nn.Module, path: Path) -> nn.Module:
    loaded = packing.load(path)
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(x), model(x))
    return loaded


def test_float_model(model, origin, tmp_path):
    sizes = packing.pack(model, tmp_path / "a.safetensors", origin)
    loaded = check_equal(model, tmp_path / "a.safetensors")
    assert loaded.a.weight is loaded.b.weight
    assert sizes.weights == sum(p.numel() for p in model.parameters())
    # The shared weight is stored once.
    assert sizes.packed_bytes == 4 * sizes.weights + 4 * 12 + 8
    assert sizes.file_bytes == (tmp_path / "a.safetensors").stat().st_size > sizes.packed_bytes
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 16])
def test_every_kind_of_encoding(model, origin, tmp_path, bits):
    encode(model.conv, Affine.nearest(model.conv.weight, model.conv.weight.flatten(1).abs().amax(1), bits=bits))
    first = Affine.nearest(model.a.weight, 0.1, bits=bits, zero_point=1.0, group_size=4)
    encode(model.a, Sum((first, Codebook.nearest(model.a.weight - first.decode(), torch.randn(3)))))
    encode(model.c, Cast(model.c.weight.detach().bfloat16()))
    quantize_input(model.conv, StaticQuantizer(bits, True, 0.1))
    quantize_input(model.c, DynamicQuantizer(8, granularity="token"))
    sizes = packing.pack(model, tmp_path / "a.safetensors", origin)
    loaded = check_equal(model, tmp_path / "a.safetensors")
    assert set(encodings(loaded)) == {"conv.weight", "a.weight", "b.weight", "c.weight"}
    codes = 54 * torch.tensor(2.0**bits - 1).log2() + 36 * (bits + torch.tensor(3.0).log2()) + 18 * 16
    rest = sum(v.numel() * v.element_size() * 8 for k, v in model.state_dict().items() if not k.endswith(("v.weight",)))
    rest -= sum(v.numel() for v in (model.a.weight, model.b.weight, model.c.weight)) * 32
    assert sizes.nominal_bits == pytest.approx(float(codes) + rest, rel=1e-6)


@pytest.mark.parametrize("layer", ["a", "b"])
def test_tied_weights_are_stored_once_with_codes(model, origin, tmp_path, layer):
    encode(getattr(model, layer), Affine.nearest(model.a.weight, 0.1, bits=4))
    packing.pack(model, tmp_path / "a.safetensors", origin)
    _, tensors = packing.read(tmp_path / "a.safetensors")
    assert not [key for key in tensors if key.startswith(("float:a.weight", "float:b.weight"))]
    loaded = check_equal(model, tmp_path / "a.safetensors")
    assert loaded.a.weight is loaded.b.weight
    assert set(encodings(loaded)) == {"a.weight", "b.weight"}


def test_a_changed_weight_is_refused(model, origin, tmp_path):
    encode(model.c, Affine.nearest(model.c.weight, 0.1, bits=4))
    with torch.no_grad():
        model.c.weight[0, 0] += 0.01
    with pytest.raises(ValueError, match=r"c\.weight no longer equals"):
        packing.pack(model, tmp_path / "a.safetensors", origin)
    assert not list(tmp_path.iterdir())


def test_overwritten_weights_get_an_honest_size(model, origin, tmp_path):
    reference = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.conv.weight.copy_(model.conv.weight.sign() * 0.1)  # few levels
        model.c.weight.add_(0.01)  # as many as weights
    before = packing.pack(model, tmp_path / "plain.safetensors", origin)
    sizes = packing.pack(model, tmp_path / "a.safetensors", origin, reference)
    found = encodings(check_equal(model, tmp_path / "a.safetensors"))
    assert set(found) == {"conv.weight"}
    assert found["conv.weight"].nominal_bits == 54
    assert sizes.packed_bytes < before.packed_bytes


def test_inferred_codebooks_keep_negative_zeros(model, origin, tmp_path):
    reference = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.conv.weight.copy_(model.conv.weight * 0)
    packing.pack(model, tmp_path / "a.safetensors", origin, reference)
    loaded = check_equal(model, tmp_path / "a.safetensors")
    assert torch.equal(loaded.conv.weight.signbit(), model.conv.weight.signbit())


@structure.operation("test_drop_bias")
def _drop_bias(model: nn.Module, layer: str) -> None:
    model.get_submodule(layer).bias = None


def test_structure_is_replayed(model, origin, tmp_path):
    structure.apply(model, "test_drop_bias", layer="c")
    packing.pack(model, tmp_path / "a.safetensors", origin)
    loaded = check_equal(model, tmp_path / "a.safetensors")
    assert loaded.c.bias is None
    assert structure.record(loaded) == [{"operation": "test_drop_bias", "layer": "c"}]


def test_half_a_file(model, origin, tmp_path):
    path = tmp_path / "a.safetensors"
    packing.pack(model, path, origin)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        packing.load(path)
    with pytest.raises(UserError, match="nowhere"):
        packing.load(tmp_path / "nowhere")


def test_foreign_files(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a qbench artifact"):
        packing.load(path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata={"qbench": json.dumps({"schema": 99})})
    with pytest.raises(UserError, match="schema 99"):
        packing.load(path)


def test_no_pickle_in_an_artifact(model, origin, tmp_path):
    for layer in weight_layers(model):
        encode(layer, Affine.nearest(layer.weight, 0.1, bits=4))
    packing.pack(model, tmp_path / "a.safetensors", origin)
    raw = (tmp_path / "a.safetensors").read_bytes()
    assert b"pickle" not in raw
    assert b"torch.nn" not in raw
