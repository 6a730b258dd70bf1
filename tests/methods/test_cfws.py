"""Coarse and fine parts: the known answers, their sum, and what the split is good for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.methods.cfws import cfws, coarse_and_fine
from qbench.quant.encodings import Affine, Sum
from qbench.quant.layers import encodings


class Nothing:
    def __len__(self) -> int:
        return 0

    def batch(self, positions: object) -> Tensor:
        raise AssertionError("cfws looks at no image")


DATA = Data(Batches(Nothing(), torch.device("cpu")), None, nn.functional.cross_entropy)


def merged(groups: int = 1) -> nn.Conv2d:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, groups=groups)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.weight[:, :, 1, 1] += torch.randn(8, 8 // groups)
    return layer


@pytest.mark.parametrize(("granularity", "key"), [("channel", "ch"), ("tensor", "tensor")])
def test_known_answers(shared: Path, granularity: str, key: str) -> None:
    with np.load(shared / "golden" / "baselines.npz") as golden:
        weight = torch.from_numpy(golden["cfws_W"])
        coarse, fine, _ = coarse_and_fine(weight, 8, granularity)
        np.testing.assert_array_equal(coarse.numpy(), golden[f"cfws_coarse_{key}"])
        np.testing.assert_array_equal(fine.numpy(), golden[f"cfws_fine_{key}"])
    torch.testing.assert_close(coarse + fine, weight, rtol=0, atol=1e-15)


def test_the_errors_of_the_known_answer(shared: Path) -> None:
    """Mean squared error 5.1e-8 with the split and 7.0e-6 without."""
    with np.load(shared / "golden" / "baselines.npz") as golden:
        weight = torch.from_numpy(golden["cfws_W"]).float()
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3)
    layer.weight = nn.Parameter(weight.clone())
    cfws(nn.Sequential(layer), DATA)
    split = float((layer.weight.detach() - weight).square().mean())
    plain = Affine.nearest(weight, weight.abs().flatten(1).amax(1) / 127, bits=8).decode()
    assert split == pytest.approx(5.1e-8, rel=0.02)
    assert float((plain - weight).square().mean()) == pytest.approx(7.0e-6, rel=0.02)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_coarse_part_is_lossless_and_the_fine_one_small(granularity: str, groups: int) -> None:
    layer = merged(groups)
    weight = layer.weight.detach().clone()
    cfws(nn.Sequential(layer), DATA, granularity=granularity)
    encoding = encodings(layer)["weight"]
    assert isinstance(encoding, Sum)
    coarse, fine = (part.decode() for part in encoding.parts)
    exact, rest, step = coarse_and_fine(weight, 8, granularity)
    torch.testing.assert_close(coarse, exact, rtol=1e-6, atol=0)
    assert bool((rest[:, :, 1, 1].abs() <= 0.501 * step[:, None]).all())
    others = torch.ones(3, 3, dtype=torch.bool)
    others[1, 1] = False
    assert float(coarse[:, :, others].abs().max()) == 0
    grid = rest.abs().flatten(1).amax(1) / 127
    assert bool(((fine - rest).abs().flatten(1).amax(1) <= 0.501 * grid).all())


def test_kernels_without_a_centre_get_one_grid() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 2), nn.ConvTranspose2d(4, 4, 3), nn.Linear(4, 2))
    cfws(model, DATA)
    assert [type(encoding) for encoding in encodings(model).values()] == [Affine, Affine, Sum, Affine]
    cfws(model, DATA, center=False)
    assert all(isinstance(encoding, Sum) for encoding in encodings(model).values())


def test_dead_channels_and_layers() -> None:
    layer = merged()
    with torch.no_grad():
        layer.weight[0] = 0
    dead = nn.Conv2d(8, 8, 3)
    nn.init.zeros_(dead.weight)
    cfws(nn.Sequential(layer, dead), DATA)
    assert not layer.weight[0].any()
    assert not dead.weight.any()
