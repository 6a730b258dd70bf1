"""Small networks that are unlike what methods are written for, as a model plugin so that artifacts of them load."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from qbench.models.base import Model, Preprocess
from qbench.registry import model


class Pooled(nn.Module):
    """Layers one after the other, the mean over positions, and a classifier."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(2).mean(2))


class Branches(nn.Module):
    """Some images pass by a layer, and how often another is called depends on the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rare, self.shrink, self.head = (
            nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        bright = x[:, 0, 0, 0] > 0
        x = self.stem(x)
        if bright.any():
            x = x.masked_scatter(bright[:, None, None, None], self.rare(x[bright]))
        for _ in range(1 + int(bright.any())):
            x = self.shrink(x).relu() / 2
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """Two layers with one weight, a layer that is called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.second.weight = self.first.weight
        self.twice, self.idle, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.stem(x)).relu())
        return self.head(self.twice(self.twice(x).relu()).mean((2, 3)))


class Padded(nn.Module):
    """Padding at one side: by the network, by a layer, and by TensorFlow's rule for strides."""

    def __init__(self) -> None:
        super().__init__()
        self.by_hand, self.same = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, (2, 4), padding="same")
        self.strided, self.head = Conv2dSame(4, 4, 3, stride=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 1, 0, 1))
        return self.head(self.strided(self.same(self.by_hand(x).relu())).mean((2, 3)))


class Dimensions(nn.Module):
    """Convolutions over one and three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.one, self.head = nn.Conv3d(1, 4, (2, 3, 3)), nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(self.three(x[:, None]).relu().flatten(2)).mean(2))


class Typed(nn.Module):
    """Computes in another type than it is given and answers in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.net = dtype, _plain().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.dtype)).float()


class Keywords(nn.Module):
    """Calls its layers with the input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.norm(self.stem(input=x).relu().mean((2, 3))))


class Attention(nn.Module):
    """Has a linear layer whose weight is used, but that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 2, stride=2), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).mT
        return self.head((tokens + self.mix(tokens, tokens, tokens)[0]).mean(1))


def _plain() -> nn.Module:
    return Pooled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), width=4)


def _dead(channels: int) -> nn.Module:
    """Some of four channels are always 0 behind the first ReLU, and one behind the second has no weights."""
    net = Pooled(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), width=4)
    with torch.no_grad():
        net.body[0].bias[:channels] = -100
        net.body[2].weight[1] = 0
        net.body[2].bias[1] = 0
    return net


def _constant() -> nn.Module:
    net = Pooled(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), width=4)
    for layer, value in ((net.body[0], 0.1), (net.body[2], -0.2), (net.body[4], 0.0)):
        nn.init.constant_(layer.weight, value)
    return net


def _padding_modes() -> nn.Module:
    modes = ("reflect", "circular", "replicate")
    convolutions = [nn.Conv2d(4 if i else 3, 4, 3, padding=1, padding_mode=mode) for i, mode in enumerate(modes)]
    return Pooled(*convolutions, width=4)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": _plain,
    "branches": Branches,
    "dead channels": lambda: _dead(2),
    "dead layer": lambda: _dead(4),
    "constant": _constant,
    "few weights": lambda: Pooled(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 2), width=1),
    "grouped": lambda: Pooled(
        nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1, groups=2), width=4
    ),
    "dilated": lambda: Pooled(nn.Conv2d(3, 4, 3, dilation=2), nn.ReLU(), nn.Conv2d(4, 4, 2, dilation=3), width=4),
    "padded": Padded,
    "tied": Tied,
    "padding modes": _padding_modes,
    "transposed": lambda: Pooled(
        nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2, stride=2), nn.ConvTranspose2d(6, 4, 3, groups=2), width=4
    ),
    "dimensions": Dimensions,
    "half": lambda: Typed(torch.float16),
    "bfloat16": lambda: Typed(torch.bfloat16),
    "double": lambda: Typed(torch.float64),
    "keywords": Keywords,
    "attention": Attention,
    "one layer": lambda: nn.Conv2d(3, 4, 3),
    "without biases": lambda: Pooled(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), width=4
    ),
    "one sample": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 1)),
}


class _Random:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def fingerprint(self) -> str:
        return self.kind

    def load(self) -> Mapping[str, Tensor]:
        torch.manual_seed(0)
        return NETWORKS[self.kind]().state_dict()


@model("odd")
def odd(*, kind: str) -> Model:
    """One of the odd networks, with random weights."""
    return Model("classification", NETWORKS[kind], _Random(kind), Preprocess((8, 8)))
