import copy
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data, Training
from qbench.methods.train import draw, train
from qbench.models.base import cross_entropy
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, encodings
from qbench.quant.schedule import Schedule


class Noise:
    def __init__(self) -> None:
        self.images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.images[list(positions)]


def run(model: nn.Module, **options: Any) -> nn.Module:
    noise, cpu = Noise(), torch.device("cpu")
    training = Training(noise, [i % 4 for i in range(32)], cpu, None)
    return train(model, Data(Batches(noise, cpu), training, cross_entropy), **options)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_drawn_weights_depend_on_the_seed_alone(name: str) -> None:
    extra = {"img_size": 16, "patch_size": 4} if name == "test_vit" else {}
    first, second = (timm.create_model(name, num_classes=4, **extra) for _ in range(2))
    before = {key: value.clone() for key, value in first.named_parameters()}
    draw(first, 1)
    draw(second, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    changed = [key for key, value in first.named_parameters() if value.dim() > 1 and torch.equal(value, before[key])]
    assert not changed
    draw(second, 2)
    different = zip(first.named_parameters(), second.parameters(), strict=True)
    assert not [key for (key, a), b in different if a.dim() > 1 and torch.equal(a, b)]


def test_what_was_quantized_is_float_afterwards() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    encode(model[1], Affine.nearest(model[1].weight, 0.01, bits=8))
    before = copy.deepcopy(model)
    assert not encodings(run(model, schedule=Schedule(steps=2, batch_size=16)))
    assert not torch.equal(model[1].weight, before[1].weight)


def test_scratch_forgets_the_given_weights() -> None:
    torch.manual_seed(0)
    ends = []
    for scale in (1.0, 3.0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
        with torch.no_grad():
            model[1].weight.mul_(scale)
        ends.append(run(model, start="scratch", schedule=Schedule(steps=2, batch_size=16))[1].weight)
    assert torch.equal(*ends)
