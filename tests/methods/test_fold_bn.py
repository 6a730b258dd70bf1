"""Batch norms disappear where they can, and the float function stays."""

from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import UserError
from qbench.methods.fold_bn import fold_bn
from qbench.methods.rtn import rtn
from qbench.quant import structure


class Noise:
    def __init__(self, size: int) -> None:
        self.x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Any) -> Tensor:
        return self.x[list(positions)]


def data_for(size: int) -> Data:
    return Data(Batches(Noise(size), torch.device("cpu")), None, nn.functional.cross_entropy)


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if getattr(m, "running_mean", None) is not None}


def with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for norm in norms(model).values():
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
    return model.eval()


def folded(model: nn.Module, size: int = 32) -> nn.Module:
    """The folded model, whose output must still be the float model's."""
    x = Noise(size).x
    with torch.no_grad():
        before = model(x)
        fold_bn(model, data_for(size))
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    return model


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "mobilenetv2_100", "test_byobnet"])
def test_all_norms_behind_convolutions_are_folded(architecture: str) -> None:
    assert not norms(folded(with_statistics(create_model(architecture))))


def test_a_folded_model_is_rebuilt_on_a_fresh_architecture() -> None:
    model = folded(with_statistics(create_model("test_efficientnet")))
    fresh = create_model("test_efficientnet").eval()
    structure.replay(fresh, structure.record(model))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(Noise(32).x), model(Noise(32).x))


def test_norms_in_front_of_convolutions_stay() -> None:
    model = folded(with_statistics(create_model("resnetv2_18", drop_path_rate=0.0)))
    left = norms(model)
    assert left
    assert all(name.endswith((".norm1", "norm", ".norm2")) for name in left)
    assert not any(name.endswith(".norm2") for name in left)


class Wired(nn.Module):
    """One convolution, one norm, and something about them that matters."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.other = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        if how == "tied":
            self.other.weight = self.conv.weight
        if how == "statistics of the batch":
            self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        if how == "own kind of norm":
            self.norm = type("Doubling", (nn.BatchNorm2d,), {"forward": lambda s, x: 2 * nn.BatchNorm2d.forward(s, x)})(
                4
            )

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.how == "in place":
            y.relu_()
        if self.how == "norm used twice":
            return self.norm(y) + self.norm(self.other(x))
        if self.how == "layer used twice":
            return self.norm(y) + self.conv(x.flip(0))
        z = self.norm(y)
        if self.how == "read by a sum":
            return z + y
        if self.how == "returned":
            return z + 0, y
        if self.how == "weight read elsewhere":
            return z + self.conv.weight.sum()
        return z + self.other(x)


@pytest.mark.parametrize(
    "how",
    [
        "tied",
        "statistics of the batch",
        "own kind of norm",
        "in place",
        "norm used twice",
        "layer used twice",
        "read by a sum",
        "returned",
        "weight read elsewhere",
    ],
)
def test_a_norm_stays_where_folding_would_change_something_else(how: str) -> None:
    model = Wired(how).eval()
    assert fold_bn(model, data_for(8)) is model
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_a_plain_pair_is_folded_and_the_convolution_gets_a_bias() -> None:
    model = Wired("plain")
    x = Noise(8).x
    with torch.no_grad():
        with_statistics(model)
        before = model(x)
        fold_bn(model, data_for(8))
        torch.testing.assert_close(model(x), before)
    assert isinstance(model.norm, nn.Identity)
    assert model.conv.bias is not None


@pytest.mark.parametrize(
    ("layer", "norm", "folds"),
    [
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), True),
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6, affine=False), True),
        (nn.Linear(7, 5), nn.BatchNorm1d(5), True),
        (nn.Linear(7, 5), nn.BatchNorm1d(4), False),
    ],
)
def test_other_layers(layer: nn.Module, norm: nn.Module, folds: bool) -> None:
    shapes = {nn.ConvTranspose2d: (2, 4, 5, 5), nn.Conv1d: (2, 4, 9), nn.Linear: (2, 7) if folds else (2, 4, 7)}
    model, x = nn.Sequential(layer, norm).eval(), torch.randn(shapes[type(layer)])
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    source = type("Source", (), {"__len__": lambda s: 2, "batch": lambda s, positions: x[list(positions)]})()
    with torch.no_grad():
        before = model(x)
        fold_bn(model, Data(Batches(source, torch.device("cpu")), None, nn.functional.cross_entropy))
        torch.testing.assert_close(model(x), before)
    assert isinstance(model[1], nn.Identity) == folds


def test_a_quantized_layer_is_not_folded() -> None:
    model = rtn(with_statistics(create_model("test_resnet")), data_for(32))
    with pytest.raises(UserError, match=r"quantized already.*put fold_bn first"):
        fold_bn(model, data_for(32))


def test_a_model_without_norms_is_left_alone() -> None:
    model = create_model("test_vit", img_size=32, patch_size=16).eval()
    assert structure.record(fold_bn(model, data_for(32))) == []
