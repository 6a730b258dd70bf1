"""GPTQ, OBQ and HQQ through networks: what is encoded, recorded and refused."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported, UserError
from qbench.methods.gptq import gptq
from qbench.methods.hqq import hqq
from qbench.methods.obq import obq
from qbench.quant.encodings import Affine
from qbench.quant.layers import encodings, named_weight_layers


class Noise:
    def __init__(self, images: int = 24) -> None:
        self.x = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


class Halves(Noise):
    def batch(self, positions: Sequence[int]) -> Tensor:
        return super().batch(positions).half()


def data_for(model: nn.Module, records: dict[str, Any] | None = None, images: int = 24) -> Data:
    store = {} if records is None else records
    batches = Batches(Noise(images), torch.device("cpu"), batch_size=8)
    return Data(batches, None, nn.functional.cross_entropy, reference=copy.deepcopy(model), record=store.__setitem__)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3, stride=2, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 49, 10),
    ).eval()


def distance(model: nn.Module, original: nn.Module) -> float:
    with torch.no_grad():
        x = Noise().x
        return float((model(x) - original(x)).norm() / original(x).norm())


@pytest.mark.parametrize("method", [gptq, obq])
def test_every_layer_is_rounded_and_its_error_recorded(method: Any, network: nn.Module) -> None:
    records: dict[str, Any] = {}
    model = method(copy.deepcopy(network), data_for(network, records), bits=3, oversample=None)
    attached = encodings(model)
    assert attached.keys() == {f"{name}.weight" for name in named_weight_layers(model)}
    assert all(isinstance(e, Affine) and (e.low, e.high, e.zero_point) == (-4, 3, None) for e in attached.values())
    with torch.no_grad():
        bias = network[7].bias
        wanted = float((network(Noise().x) - bias).norm())
        error = float((model(Noise().x) - network(Noise().x)).norm())
    assert records["layer_error"]["7"] == pytest.approx(error / wanted, rel=1e-3)
    rounded = copy.deepcopy(network)
    for name, layer in named_weight_layers(rounded).items():
        code = attached[f"{name}.weight"]
        layer.weight.data = Affine.nearest(layer.weight, code.scale, low=code.low, high=code.high).decode()
    assert distance(model, network) < 0.8 * distance(rounded, network)


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "group", "group_size": 16, "symmetric": False, "calibration": "mse24"},
        {"granularity": "group", "group_size": 8, "act_order": True},
        {"symmetric": False, "act_order": True, "images": 8, "oversample": 1},
    ],
)
def test_options_of_gptq(options: dict[str, Any], network: nn.Module) -> None:
    model = gptq(copy.deepcopy(network), data_for(network), bits=4, **options)
    for name, layer in named_weight_layers(model).items():
        code = encodings(model)[f"{name}.weight"]
        assert isinstance(code, Affine)
        columns = layer.weight[0].numel()
        size = options.get("group_size", columns)
        assert code.scale.shape == (len(layer.weight), -(-columns // size))
        assert (code.zero_point is None) == options.get("symmetric", True)
        assert torch.equal(code.decode(), layer.weight)
    assert distance(model, network) < 0.15


def test_edges_skipped_layers_and_one_image(network: nn.Module) -> None:
    for method in (gptq, obq, hqq):
        model = method(
            copy.deepcopy(network), data_for(network, images=1), bits=2, edge_bits=8, layer_bits={"4": 3}, skip=("2",)
        )
        levels = {name: code.levels for name, code in encodings(model).items()}
        assert levels == {"0.weight": 256, "4.weight": 8, "7.weight": 256}


def test_transformers_and_residual_networks_work() -> None:
    for original in (create_model("test_efficientnet"), create_model("test_vit", img_size=16, patch_size=16)):
        model = gptq(copy.deepcopy(original.eval()), data_for(original), bits=4)
        assert len(encodings(model)) == len(named_weight_layers(model))


@pytest.mark.parametrize("method", [gptq, obq])
def test_float16_and_dead_channels(method: Any) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        original[0].weight[3] = original[0].bias[3] = 0
        original[2].bias.zero_()
    original.eval().half()
    half = Batches(Halves(), torch.device("cpu"), batch_size=8)
    data = Data(half, None, nn.functional.cross_entropy, reference=copy.deepcopy(original))
    model = method(copy.deepcopy(original), data, bits=6)
    assert all(layer.weight.dtype == torch.float16 for layer in named_weight_layers(model).values())
    assert not model[0].weight[3].any()
    assert not model[4].weight[:, 3].any()  # it sees zeros only
    with torch.no_grad():
        x = Halves().x.half()
        assert (model(x) - original(x)).norm() < 0.1 * original(x).norm()


def test_hqq_needs_no_data_and_takes_transposed_convolutions() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv1d(4, 6, 3)).half()
    model = hqq(copy.deepcopy(original), data_for(original), bits=4)
    codes = encodings(model)
    assert {name: code.scale.shape for name, code in codes.items()} == {"0.weight": (4, 1), "1.weight": (6, 1)}
    for layer, was in zip(model, original, strict=True):
        assert (layer.weight - was.weight).abs().max() < 0.1 * was.weight.abs().max()


def test_what_cannot_be_done_is_said(network: nn.Module) -> None:
    transposed = nn.Sequential(nn.ConvTranspose2d(3, 4, 2)).eval()
    with pytest.raises(Unsupported, match=r"^0: .*ConvTranspose2d.*skip"):
        gptq(transposed, data_for(transposed))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1600), nn.Linear(1600, 2)).eval()
    with pytest.raises(Unsupported, match=r"^2: 1600 weights for an output"):
        obq(wide, data_for(wide), skip=("1",))
    few = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).eval()
    with pytest.raises(UserError, match=r"^1: damp"):
        gptq(few, data_for(few), damp=0.0)
