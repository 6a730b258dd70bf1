"""AdaQuant: what is learned, what stays, what is refused."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.methods.activations import activations
from qbench.methods.adaquant import adaquant
from qbench.methods.rtn import rtn
from qbench.quant.activations import input_quantizers
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, encodings, named_weight_layers


class Noise:
    def __init__(self, images: int = 24) -> None:
        self.x = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


def data_for(model: nn.Module, records: dict[str, Any] | None = None, images: int = 24) -> Data:
    store = {} if records is None else records
    batches = Batches(Noise(images), torch.device("cpu"), batch_size=8)
    return Data(batches, None, nn.functional.cross_entropy, reference=copy.deepcopy(model), record=store.__setitem__)


def output_error(model: nn.Module, original: nn.Module) -> float:
    with torch.no_grad():
        x = Noise().x
        return float((model(x) - original(x)).norm() / original(x).norm())


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("test_resnet").eval()


def test_it_is_nearer_to_float_than_rounding(network: nn.Module) -> None:
    records: dict[str, Any] = {}
    model = adaquant(copy.deepcopy(network), data_for(network, records), bits=3, steps=60)
    attached = encodings(model)
    assert attached.keys() == {f"{name}.weight" for name in named_weight_layers(model)}
    assert all(isinstance(e, Affine) and (e.low, e.high) == (-4, 3) for e in attached.values())
    assert all(kept <= start for start, kept in records["reconstruction_error"].values())
    rounded = rtn(copy.deepcopy(network), data_for(network), bits=3, calibration="mse")
    assert output_error(model, network) < 0.8 * output_error(rounded, network)
    assert not torch.equal(model.fc.bias, network.fc.bias)


def test_input_quantizers_are_in_effect_and_stay(network: nn.Module) -> None:
    model = activations(copy.deepcopy(network), data_for(network), bits=3)
    attached = input_quantizers(model)
    rounded = rtn(copy.deepcopy(model), data_for(network), bits=4, calibration="mse")
    records: dict[str, Any] = {}
    model = adaquant(model, data_for(network, records), bits=4, steps=30)
    assert input_quantizers(model) == attached
    assert output_error(model, network) < output_error(rounded, network)
    assert records["reconstruction_error"]["fc"][1] == pytest.approx(output_error(model, network) ** 2, rel=1e-3)


def test_what_does_not_help_is_undone() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    model = adaquant(copy.deepcopy(original), data_for(original), bits=4, steps=5, lr=50.0)
    nearest = adaquant(copy.deepcopy(original), data_for(original), bits=4, steps=1, lr=1e-9)
    assert torch.equal(model[0].weight, nearest[0].weight)
    assert torch.equal(model[0].bias, original[0].bias)


def test_one_image_dead_channels_and_transposed_convolutions() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        original[0].weight[1] = 0
    model = adaquant(copy.deepcopy(original.eval()), data_for(original, images=1), steps=10, edge_bits=8, skip=("3",))
    attached = encodings(model)
    assert {name: e.high for name, e in attached.items() if isinstance(e, Affine)} == {"0.weight": 127, "2.weight": 7}
    assert output_error(model, original) < 0.5


def test_quantized_biases_are_refused() -> None:
    original = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    model = copy.deepcopy(original)
    encode(model[0], Affine.nearest(model[0].bias, 0.01, bits=8), "bias")
    with pytest.raises(Unsupported, match="bias of 0"):
        adaquant(model, data_for(original), steps=1)
