"""Moving weights to the ends of the grid, through networks."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.methods.msq_preprocess import msq_preprocess
from qbench.methods.rtn import rtn
from qbench.metrics.error_bound import error_bound
from qbench.quant.encodings import Affine
from qbench.quant.layers import encodings


class Latent:
    """Images that are mixtures of few patterns: what the method needs."""

    def __init__(self, images: int, patterns: int) -> None:
        generator = torch.Generator().manual_seed(0)
        mixed = torch.randn(images, patterns, generator=generator) @ torch.randn(patterns, 192, generator=generator)
        self.x = mixed.reshape(images, 3, 8, 8)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


def data_for(model: nn.Module, records: dict[str, Any] | None = None, images: int = 64, patterns: int = 8) -> Data:
    store = {} if records is None else records
    batches = Batches(Latent(images, patterns), torch.device("cpu"), batch_size=32)
    loss = nn.functional.cross_entropy
    return Data(batches, None, loss, reference=copy.deepcopy(model), record=store.__setitem__)


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32)).eval()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = -1  # a dead neuron, and a dead input of the next layer
    return model


def output_error(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - original(x)).norm() / original(x).norm())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_with_few_directions_it_is_far_better_than_rounding(bits: int) -> None:
    original, x = dense(), Latent(64, 8).x
    model = msq_preprocess(copy.deepcopy(original), data_for(original), bits=bits)
    (encoding,) = encodings(model).values()
    assert isinstance(encoding, Affine)
    assert encoding.levels == 2**bits
    ends = ((encoding.codes == 0) | (encoding.codes == 2**bits - 1)).sum(1)
    assert (ends >= 192 - 8).all()
    rounded = rtn(copy.deepcopy(original), data_for(original), bits=max(bits, 2))
    assert output_error(model, original, x) < 0.6 * output_error(rounded, original, x)


@pytest.mark.parametrize("options", [{}, {"granularity": "layer"}, {"rows": 2}, {"share": 1.0, "images": 1}])
def test_networks_with_groups_and_dead_neurons(options: dict[str, Any]) -> None:
    original, records = convolutions(), {}
    model = msq_preprocess(copy.deepcopy(original), data_for(original, records, patterns=64), bits=3, **options)
    attached = encodings(model)
    assert len(attached) == 4
    assert all(isinstance(e, Affine) and e.levels == 8 for e in attached.values())
    assert model[0].weight[3].abs().max() < (1e-12 if options.get("granularity") != "layer" else 1)
    values = error_bound(SimpleNamespace(records=records))
    assert values["applies_to"] == 4
    for layer in values["layers"].values():
        assert layer["error"] <= layer["bound"] * 1.001
        assert layer["error"] <= layer["after"] * 1.001
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_one_image_and_bits_of_single_layers() -> None:
    original = convolutions()
    data = data_for(original, images=1)
    model = msq_preprocess(copy.deepcopy(original), data, bits=2, layer_bits={"4": 5}, edge_bits=8)
    levels = {name: e.levels for name, e in encodings(model).items() if isinstance(e, Affine)}
    assert levels == {"0.weight": 256, "2.weight": 4, "4.weight": 32, "6.weight": 256}


def test_it_is_the_same_every_time() -> None:
    original = convolutions()
    first, second = (msq_preprocess(copy.deepcopy(original), data_for(original), bits=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_transposed_convolutions_are_refused() -> None:
    transposed = nn.Sequential(nn.ConvTranspose2d(3, 4, 2)).eval()
    with pytest.raises(Unsupported, match=r"^0: .*ConvTranspose2d.*skip"):
        msq_preprocess(transposed, data_for(transposed))
