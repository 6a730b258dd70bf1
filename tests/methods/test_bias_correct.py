"""After bias correction every layer's mean output is the float network's."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.methods.bias_correct import bias_correct
from qbench.methods.fold_bn import fold_bn
from qbench.methods.rtn import rtn
from qbench.quant import structure
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, named_weight_layers


class Noise:
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


def data_for(reference: nn.Module | None) -> Data:
    batches = Batches(Noise(), torch.device("cpu"), batch_size=8)
    return Data(batches, None, nn.functional.cross_entropy, reference=reference)


def layer_means(model: nn.Module, images: Tensor = Noise.x) -> dict[str, Tensor]:
    means = {}
    handles = [
        layer.register_forward_hook(
            lambda m, _, y, name=name: means.__setitem__(
                name, y.movedim(-1 if isinstance(m, nn.Linear) else 1, 0).flatten(1).mean(1)
            )
        )
        for name, layer in named_weight_layers(model).items()
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return means


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit"])
def test_means_agree_in_every_layer(architecture: str, fold: bool) -> None:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 16} if architecture == "test_vit" else {}
    original = create_model(architecture, **options).eval()
    if fold:
        fold_bn(original, data_for(None))
    model = rtn(copy.deepcopy(original), data_for(original), bits=3)
    bias_correct(model, data_for(original))
    want, got = layer_means(original), layer_means(model)
    for name, mean in want.items():
        torch.testing.assert_close(got[name], mean, rtol=1e-4, atol=1e-5 * (1 + float(mean.abs().max())))
    fresh = create_model(architecture, **options).eval()
    structure.replay(fresh, structure.record(model))
    fresh.load_state_dict(model.state_dict())


class Still(nn.Module):
    """Its norm's statistics are exactly those of its input, and each of its channels is normally distributed."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1, groups=8, bias=False), nn.BatchNorm2d(8, eps=0)
        self.activation, self.reader = activation, nn.Conv2d(8, 6, 1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reader(self.activation(self.norm(self.conv(x))))
        return self.last(y + y.square())


class Normals(Noise):
    def __init__(self) -> None:
        values = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096).float()
        shuffled = torch.stack([values[torch.randperm(4096)] for _ in range(8)])
        self.x = shuffled.reshape(8, 4, 32, 32).transpose(0, 1).contiguous()


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.ReLU6()])
@pytest.mark.parametrize("fold", [True, False])
def test_batch_norms_that_are_true_correct_without_data(activation: nn.Module, fold: bool) -> None:
    torch.manual_seed(0)
    original, images, recorded = Still(activation).eval(), Normals(), {}
    with torch.no_grad():
        rows = original.conv(images.x).transpose(0, 1).flatten(1)
        original.norm.running_mean.copy_(rows.mean(1))
        original.norm.running_var.copy_(rows.var(1, unbiased=False))
        nn.init.normal_(original.norm.weight, 0, 2)
        nn.init.normal_(original.norm.bias, 0, 2)
    batches = Batches(images, torch.device("cpu"))
    loss = nn.functional.cross_entropy
    if fold:
        fold_bn(original, Data(batches, None, loss))
    data = Data(batches, None, loss, reference=original, record=recorded.__setitem__)
    model = rtn(copy.deepcopy(original), data, bits=2, skip=("conv",))
    biased = layer_means(model, images.x)["reader"]
    bias_correct(model, data, source="batch_norm")
    want, got = layer_means(original, images.x)["reader"], layer_means(model, images.x)["reader"]
    assert float((biased - want).abs().max()) > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    assert recorded["bias_shift"].keys() == {"reader"}
    assert recorded["bias_kept"] == ["conv", "last"]


def test_networks_without_batch_norms_need_calibration_images() -> None:
    model = create_model("test_vit", img_size=32, patch_size=16).eval()
    with pytest.raises(Unsupported, match="use source=calibration"):
        bias_correct(model, data_for(copy.deepcopy(model)), source="batch_norm")


class Shown(nn.Module):
    """A network whose last layer sees rows of `table` (m, d), chosen by its input (B, 1)."""

    def __init__(self, table: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.fc = nn.Linear(weight.shape[1], len(weight)).double()
        self.fc.weight.data, self.fc.bias.data = weight.clone(), bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.table[x.flatten().long()])


class Positions:
    def __len__(self) -> int:
        return 40

    def batch(self, positions: Sequence[int]) -> Tensor:
        return torch.tensor(list(positions))[:, None].float()


def test_known_answer(shared: Path) -> None:
    with np.load(shared / "golden" / "gpfq_spfq.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in ("W", "X", "Xt", "Q_b3", "bias", "bias_corrected_b3")}
    original = Shown(golden["X"], golden["W"], golden["bias"]).eval()
    model = Shown(golden["Xt"], golden["Q_b3"], golden["bias"]).eval()
    batches = Batches(Positions(), torch.device("cpu"), batch_size=16)
    bias_correct(model, Data(batches, None, nn.functional.cross_entropy, reference=original))
    torch.testing.assert_close(model.fc.bias.data, golden["bias_corrected_b3"], rtol=0, atol=1e-12)


def test_transposed_convolutions_are_corrected() -> None:
    original = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2, bias=False)).eval()
    model = copy.deepcopy(original)
    encode(model[0], Affine.nearest(model[0].weight, 0.1, bits=3, axis=1))
    bias_correct(model, data_for(original))
    torch.testing.assert_close(layer_means(model)["0"], layer_means(original)["0"], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_done_is_said() -> None:
    model = create_model("test_resnet").eval()
    with pytest.raises(Unsupported, match="float network"):
        bias_correct(model, data_for(None))
    with pytest.raises(Unsupported, match="no layer"):
        bias_correct(model, data_for(create_model("test_efficientnet").eval()))
    encode(model.fc, Affine.nearest(model.fc.bias, 0.1, bits=8), "bias")
    with pytest.raises(Unsupported, match="bias of fc is quantized"):
        bias_correct(model, data_for(create_model("test_resnet").eval()))
