import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data, Training
from qbench.errors import Unsupported
from qbench.methods.lsq import lsq
from qbench.models.base import cross_entropy
from qbench.quant.activations import StaticQuantizer, input_quantizers
from qbench.quant.encodings import Affine
from qbench.quant.layers import encodings
from qbench.quant.schedule import Schedule
from qbench.quant.training import fit


class Corners:
    """16x16 images; the class is the corner that is bright."""

    def __init__(self, images: int = 96) -> None:
        generator = torch.Generator().manual_seed(5)
        self.targets = [i % 4 for i in range(images)]
        self.images = torch.randn(images, 3, 16, 16, generator=generator)
        for i, target in enumerate(self.targets):
            row, column = divmod(target, 2)
            self.images[i, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1.0

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.images[list(positions)]

    def right(self, model: nn.Module) -> float:
        with torch.no_grad():
            return (model(self.images).argmax(1) == torch.tensor(self.targets)).float().mean().item()


def make_data(reference: nn.Module | None = None) -> tuple[Data, Corners, dict[str, Any]]:
    corners, records = Corners(), {}
    cpu = torch.device("cpu")
    training = Training(corners, corners.targets, cpu, None)
    batches = Batches(corners, cpu, 32)
    return Data(batches, training, cross_entropy, reference=reference, record=records.__setitem__), corners, records


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip
    return fit(model, make_data()[0], Schedule(epochs=10, batch_size=32, lr=1e-2, optimizer="adamw"))


@pytest.mark.parametrize(
    ("bits", "granularity", "optimizer"), [(2, "tensor", "sgd"), (4, "channel", "sgd"), (2, "channel", "adamw")]
)
def test_low_bits_come_close_to_float(trained: nn.Module, bits: int, granularity: Any, optimizer: Any) -> None:
    data, corners, records = make_data(trained)
    lr = 0.01 if optimizer == "sgd" else 1e-3
    model = lsq(
        copy.deepcopy(trained),
        data,
        bits=bits,
        activation_bits=bits,
        granularity=granularity,
        schedule=Schedule(epochs=6, batch_size=32, optimizer=optimizer, lr=lr),
    )
    assert corners.right(trained) > 0.95
    assert corners.right(model) > 0.9
    assert records["lsq"]["deployed_difference"] <= 1e-5
    assert len(records["lsq"]["state"]) == 8
    assert all(min(steps) > 0 and steps[0] != steps[-1] for steps in records["lsq"]["state"].values())
    widths = [encoding.levels for encoding in encodings(model).values() if isinstance(encoding, Affine)]
    assert widths == [256, 2**bits, 2**bits, 256]
    fixed = input_quantizers(model)
    assert all(type(quantizer) is StaticQuantizer for quantizer in fixed.values())
    assert [quantizer.bits for quantizer in fixed.values()] == [8, bits, bits, 8]
    assert [quantizer.symmetric for quantizer in fixed.values()] == [True, False, False, False]


def test_the_same_seed_gives_the_same_artifact(trained: nn.Module) -> None:
    first, second = (lsq(copy.deepcopy(trained), make_data(trained)[0], schedule=Schedule(steps=4)) for _ in range(2))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_result_packs_and_loads(trained: nn.Module, tmp_path: Path) -> None:
    from qbench.quant.packing import Origin, pack, read

    model = lsq(copy.deepcopy(trained), make_data()[0], schedule=Schedule(steps=2))
    pack(model, tmp_path / "a.safetensors", Origin("none", {}))
    header, _ = read(tmp_path / "a.safetensors")
    assert len(header["encodings"]) == len(header["quantizers"]) == 4
    assert set(model.state_dict()) == set(trained.state_dict()) | {
        f"{name}.input_quantizer.{part}" for name in input_quantizers(model) for part in ("scale", "zero_point")
    }
    copy.deepcopy(model)


def test_weights_only_and_float_edges(trained: nn.Module) -> None:
    model = lsq(copy.deepcopy(trained), make_data()[0], activation_bits=None, edge_bits=32, schedule=Schedule(steps=2))
    assert not input_quantizers(model)
    assert set(encodings(model)) == {"4.weight", "9.weight"}


def test_distillation_uses_the_float_network(trained: nn.Module) -> None:
    data, corners, _ = make_data(trained)
    before = copy.deepcopy(trained.state_dict())
    schedule = Schedule(distillation=1.0, epochs=4, batch_size=32)
    model = lsq(copy.deepcopy(trained), data, bits=2, schedule=schedule)
    assert corners.right(model) > 0.9
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    with pytest.raises(Unsupported, match="no float network"):
        lsq(copy.deepcopy(trained), make_data()[0], schedule=schedule)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_real_architectures(name: str) -> None:
    torch.manual_seed(0)
    extra = {"img_size": 16, "patch_size": 4} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=4, **extra).eval()
    data, _, records = make_data(copy.deepcopy(model))
    deployed = lsq(model, data, schedule=Schedule(steps=3, batch_size=32))
    assert records["lsq"]["deployed_difference"] <= 1e-5
    assert len(encodings(deployed)) == len(input_quantizers(deployed)) > 5
    assert len(records["training"]["timing"]["quantized"]) == 2
