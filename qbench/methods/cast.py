"""Narrower floats."""

from typing import Literal

import torch
from torch import nn

from qbench.data import Data
from qbench.quant.encodings import Cast
from qbench.quant.layers import encode, select_layers, weight_of
from qbench.registry import method

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


@method("cast")
def cast(
    model: nn.Module,
    data: Data,
    *,
    dtype: Literal["float16", "bfloat16", "float8_e4m3", "float8_e5m2"] = "float16",
) -> nn.Module:
    """Store the weights as narrower floats, without a scale.

    Weights beyond the largest finite number of the type become that number; activations stay in float32.
    """
    narrow = _DTYPES[dtype]
    largest = torch.finfo(narrow).max
    for _, layer, _ in select_layers(model, 16):
        encode(layer, Cast(weight_of(layer).clamp(-largest, largest).to(narrow)))
    return model
