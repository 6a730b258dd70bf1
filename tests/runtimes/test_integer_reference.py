"""One layer with 8-bit weights, inputs and outputs, against arithmetic in integers alone: at most one step apart."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qbench import registry
from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, encodings, weight_of
from qbench.runtimes.base import Runtime
from qbench.runtimes.saturation import saturates

_SHIFT = 31


def _multiplier(factor: float) -> tuple[int, int]:
    """Mantissa of 31 bits and shift, so that factor = mantissa * 2 ** -(31 + shift)."""
    shift = int(np.floor(-np.log2(factor)))
    return round(factor * 2.0 ** (_SHIFT + shift)), shift


def integer_layer(
    layer: nn.Module, encoding: Affine, quantizer: StaticQuantizer, out: StaticQuantizer, x: Tensor
) -> np.ndarray:
    """Codes (B, ...) of the layer's output: integer sums, biases and multipliers; floats end with the input's codes."""
    zero, step = int(quantizer.zero_point), float(quantizer.scale)
    codes = torch.clamp(torch.round(x.double() / step) + zero, quantizer.low, quantizer.high).long()
    scale = encoding.scale.double()[:, 0] * step
    weight = encoding.codes.double()
    bias = torch.round(layer.bias.detach().double() / scale)
    centred = (codes - zero).double()  # exact: sums stay below 2 ** 53
    if isinstance(layer, nn.Conv2d):
        total = torch.nn.functional.conv2d(
            centred, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    else:
        total = torch.nn.functional.linear(centred, weight, bias)
    sums = total.long().movedim(1, -1).numpy()
    pairs = [_multiplier(float(s) / float(out.scale)) for s in scale]
    scaled = np.stack([_rounded_shift(sums[..., c] * m, _SHIFT + n) for c, (m, n) in enumerate(pairs)], axis=-1)
    return np.moveaxis(np.clip(scaled + int(out.zero_point), out.low, out.high), -1, 1)


def _rounded_shift(values: np.ndarray, bits: int) -> np.ndarray:
    return (values + (1 << (bits - 1))) >> bits


def _identity(like: nn.Module, features: int) -> nn.Module:
    """A layer that returns its input, so that the quantizer in front of it is all that can be seen."""
    same = (
        nn.Conv2d(features, features, 1, bias=False)
        if isinstance(like, nn.Conv2d)
        else nn.Linear(features, features, bias=False)
    )
    codes = torch.eye(features).reshape(same.weight.shape)
    encode(same, Affine(codes.long(), torch.ones(features, 1), -127, 127))
    return same


CASES = {
    "convolution": (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 9)),
    "strided": (nn.Conv2d(3, 8, 7, stride=2, padding=3), (2, 3, 17, 17)),
    "depthwise": (nn.Conv2d(16, 16, 3, padding=1, groups=16), (2, 16, 9, 9)),
    "pointwise": (nn.Conv2d(32, 16, 1), (2, 32, 5, 5)),
    "linear": (nn.Linear(64, 32), (5, 64)),
}


@functools.cache
def _exact_engine(runtime: str) -> Runtime:
    engine: Runtime = registry.get("runtime", runtime)()
    if saturates(engine, 1):
        pytest.skip("the integer kernels of this CPU saturate (it has no VNNI)")
    return engine


@pytest.mark.parametrize("symmetric", [False, True], ids=["zero point", "symmetric"])
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("case", CASES)
def test_at_most_one_step_apart(case: str, runtime: str, symmetric: bool) -> None:
    pytest.importorskip(runtime)
    engine = _exact_engine(runtime)
    layer, shape = CASES[case]
    x = torch.randn(*shape)
    weight = weight_of(layer)
    encode(layer, Affine.nearest(weight, weight.flatten(1).abs().amax(1) / 127, bits=8))
    quantize_input(layer, StaticQuantizer(8, True, 3 / 127) if symmetric else StaticQuantizer(8, False, 6 / 255, 131))
    with torch.no_grad():
        top = float(layer(x).abs().max())
    same = _identity(layer, len(weight))
    quantize_input(
        same, StaticQuantizer(8, True, top / 127) if symmetric else StaticQuantizer(8, False, 2 * top / 255, 127)
    )
    model = nn.Sequential(layer, same).eval().requires_grad_(False)
    compiled = engine.compile(model, x, threads=1)
    assert compiled.integer_layers >= 1
    out = same.input_quantizer
    found = np.round(compiled.run(x.numpy())[0] / float(out.scale)).astype(int) + int(out.zero_point)
    wanted = integer_layer(layer, encodings(model)["0.weight"], layer.input_quantizer, out, x)
    assert np.abs(found - wanted).max() <= 1
    # Apart are values near the middle of a step: multipliers and biases in float are rounded differently.
    assert np.mean(found != wanted) < 0.02
