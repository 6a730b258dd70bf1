"""AdaRound: against every rounding there is, and through networks."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.methods.adaround import adaround, learn_rounding
from qbench.methods.rtn import rtn
from qbench.quant.encodings import Affine
from qbench.quant.gram import grams
from qbench.quant.layers import encodings, named_weight_layers
from qbench.quant.soft_rounding import SoftRounding, fitted_grid


class Noise:
    def __init__(self, images: int = 24, size: int = 32) -> None:
        self.x = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


def data_for(model: nn.Module, records: dict[str, Any] | None = None, images: int = 24) -> Data:
    store = {} if records is None else records
    batches = Batches(Noise(images, 16), torch.device("cpu"), batch_size=8)
    return Data(batches, None, nn.functional.cross_entropy, reference=copy.deepcopy(model), record=store.__setitem__)


def output_error(model: nn.Module, original: nn.Module) -> float:
    with torch.no_grad():
        return float((model(Noise(24, 16).x) - original(Noise(24, 16).x)).norm() / original(Noise(24, 16).x).norm())


def test_it_comes_close_to_the_best_of_all_roundings() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    torch.manual_seed(0)
    layer = nn.Linear(8, 32, bias=False)
    grid = fitted_grid(layer.weight, 3, symmetric=True)
    sums = grams(layer, [x])
    learned, _ = learn_rounding(layer.weight.detach(), grid, sums, steps=600)
    soft = SoftRounding(layer.weight, grid)
    ups = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)))
    all_codes = (soft.floor[:, None] + ups).clamp(grid.low, grid.high)
    every = ((all_codes * grid.scale[:, None] - layer.weight.detach()[:, None]) @ x.T).square().sum(2)

    def error(codes: Affine) -> Tensor:
        return ((codes.decode() - layer.weight.detach()) @ x.T).square().sum(1)

    best, own, nearest = every.min(1).values, error(learned), error(grid)
    assert (own >= best * 0.9999).all()
    assert (own <= nearest * 1.0001).all()
    assert own.sum() < 1.5 * best.sum()
    assert own.sum() < 0.8 * nearest.sum()


def test_with_uncorrelated_inputs_it_rounds_to_nearest() -> None:
    layer = nn.Linear(16, 8, bias=False)
    grid = fitted_grid(layer.weight, 4, symmetric=True)
    sums = grams(layer, [torch.eye(16)])
    learned, (nearest, kept) = learn_rounding(layer.weight.detach(), grid, sums, steps=200)
    assert torch.equal(learned.codes, grid.codes)
    assert nearest == kept


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit"])
def test_networks_are_nearer_to_float_than_by_rounding(architecture: str) -> None:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4} if architecture == "test_vit" else {}
    original, records = create_model(architecture, **size).eval(), {}
    model = adaround(copy.deepcopy(original), data_for(original, records), bits=3, steps=30, symmetric=False)
    attached = encodings(model)
    assert attached.keys() == {f"{name}.weight" for name in named_weight_layers(model)}
    assert all(isinstance(e, Affine) and (e.low, e.high) == (0, 7) for e in attached.values())
    assert all(kept <= nearest * 1.001 for nearest, kept in records["reconstruction_error"].values())
    rounded = rtn(copy.deepcopy(original), data_for(original), bits=3, symmetric=False, calibration="mse")
    assert output_error(model, original) < 0.8 * output_error(rounded, original)


def test_one_image_edges_and_skipped_layers() -> None:
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        original[1].weight[0] = 0
    model = adaround(copy.deepcopy(original.eval()), data_for(original, images=1), edge_bits=8, skip=("2",), steps=20)
    attached = encodings(model)
    assert attached.keys() == {"0.weight", "1.weight", "3.weight"}
    assert (attached["0.weight"].high, attached["1.weight"].high) == (127, 7)
    assert model(Noise(24, 16).x).isfinite().all()


def test_transposed_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2)).eval()
    with pytest.raises(Unsupported, match=r"^0: .*skip"):
        adaround(model, data_for(model))
