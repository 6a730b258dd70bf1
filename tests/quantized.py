"""Small quantized networks to prove something of."""

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.models.base import Preprocess
from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, weight_layers, weight_of

GREY = Preprocess((1, 2), mean=(0.0,), std=(1.0,))
COLOUR = Preprocess((6, 6), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


class Residual(nn.Module):
    """Pooling of both kinds, a batch norm, a residual sum, views; modules and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.act = nn.Conv2d(6, 6, 3, padding=1, groups=2, padding_mode="reflect"), nn.ReLU6()
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = F.max_pool2d(x, 3, stride=1, padding=1) + self.second(x)
        x = F.adaptive_avg_pool2d(self.act(x), 2).sigmoid()
        return self.last(self.drop(x.view(x.size(0), -1)))


def residual(seed: int = 0) -> nn.Module:
    """The same, with random weights and statistics."""
    torch.manual_seed(seed)
    model = Residual().eval()
    for values in (model.norm.running_mean, model.norm.weight, model.norm.bias):
        nn.init.normal_(values)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model


def linear(seed: int, *sizes: int, size: float = 1.0) -> nn.Module:
    """Linear layers with ReLU between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for d, n in pairwise(sizes):
        layers += [nn.Linear(d, n), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval()
    for layer in weight_layers(model):
        nn.init.normal_(layer.weight, std=size / layer.weight.shape[1] ** 0.5)
        nn.init.normal_(layer.bias, std=0.3)
    return model


def quantize(model: nn.Module, images: Tensor, bits: int = 4, inputs: bool = True) -> nn.Module:
    """Weights, and inputs by the range that these images give them: with a sign, without, or with a zero point."""
    for i, layer in enumerate(weight_layers(model)):
        weight = weight_of(layer)
        encode(layer, Affine.nearest(weight, weight.flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1), bits=bits))
        if inputs:
            quantize_input(layer, StaticQuantizer(bits))
            layer.input_quantizer.register_forward_pre_hook(_calibrate(i % 2 == 0))
    with torch.no_grad():
        model(images)
    return model


def _calibrate(zero_point: bool):
    def set_range(quantizer: StaticQuantizer, args: tuple[Tensor]) -> None:
        quantizer._forward_pre_hooks.clear()
        low, high = min(0.0, float(args[0].min())), 0.9 * float(args[0].max())
        if zero_point:
            quantizer.scale.fill_((high - low) / (2**quantizer.bits - 1))
            quantizer.zero_point.fill_(round(-low / float(quantizer.scale)))
        elif low < 0:
            quantizer.symmetric, quantizer.low = True, -(2 ** (quantizer.bits - 1))
            quantizer.high = quantizer.low + 2**quantizer.bits - 1
            quantizer.scale.fill_(max(high, -low) / quantizer.high)
        else:
            quantizer.scale.fill_(high / quantizer.high)

    return set_range


def sample(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Whole pixels in a box (C, H, W), many of them at its ends: (count, C, H, W)."""
    drawn = torch.rand(count, *low.shape, generator=torch.Generator().manual_seed(0))
    inside = low + (drawn * (high - low + 1)).floor().minimum(high - low)
    side = torch.where(drawn < 0.5, low, high)
    return torch.where(torch.arange(count).view(-1, 1, 1, 1) % 2 == 0, inside, side)


class Images:
    """Evaluation images (N, C, H, W) of whole pixels, as an `ImageArray` has them."""

    def __init__(self, pixels: Tensor, targets: list[int]) -> None:
        self._pixels, self.split = pixels, SimpleNamespace(targets=targets)

    def __len__(self) -> int:
        return len(self._pixels)

    def pixels(self, positions: list[int]) -> Tensor:
        return self._pixels[positions]


def finished(
    floats: nn.Module, quantized: nn.Module, pixels: Tensor, targets: list[int], preprocess: Preprocess
) -> Any:
    """What the metrics read of a finished run."""
    with torch.no_grad():
        right = quantized(preprocess.normalize(pixels)).argmax(1) == torch.tensor(targets)
    return SimpleNamespace(
        model=SimpleNamespace(preprocess=preprocess),
        load_float=lambda: copy.deepcopy(floats),
        quantized=quantized,
        images=Images(pixels, targets),
        outcomes={"correct": right.numpy()},
        data=SimpleNamespace(seed=0, example=preprocess.normalize(pixels[:1])),
    )
