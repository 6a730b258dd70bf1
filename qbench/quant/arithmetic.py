"""The arithmetic of training steps: float32, or narrower numbers in the products, with float32 weights behind them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import nn

from qbench.errors import Unsupported
from qbench.machine import machine

Precision = Literal["float32", "bf16", "fp16", "int8"]
_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FP16_FLAGS = {"avx512_fp16", "amx_fp16"}


def check(precision: Precision, device: torch.device) -> None:
    """Look whether the device can.

    Raises:
        Unsupported: it cannot, or could only pretend to.
    """
    if precision == "fp16" and device.type == "cpu" and not _FP16_FLAGS & set(machine()["cpu_flags"]):
        raise Unsupported("this processor has no float16 arithmetic (avx512_fp16, amx_fp16)")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Unsupported("this GPU has no bfloat16 arithmetic")
    if precision == "int8" and importlib.util.find_spec("torchao") is None:
        raise Unsupported("int8 training needs torchao: pip install 'qbench[int8]'")


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Products in bfloat16 or float16, where PyTorch holds that to be safe."""
    return torch.autocast(device.type, dtype=_NARROW.get(precision, torch.bfloat16), enabled=precision in _NARROW)


@contextmanager
def integer_products(model: nn.Module, precision: Precision) -> Iterator[None]:
    """With `int8`, linear layers multiply int8 numbers meanwhile, forwards and backwards, as torchao does it.

    Inputs, weights and gradients are rounded at each step, with a scale for each row; weights stay float32.

    Raises:
        Unsupported: the model has no plain linear layer; torchao has nothing for convolutions.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear] if precision == "int8" else []
    if precision == "int8":
        if not layers:
            raise Unsupported("int8 training is for linear layers, of which there are none here")
        _swap(model)
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
            del layer.config


def _swap(model: nn.Module) -> None:
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_

    config = Int8MixedPrecisionTrainingConfig(module_swap=True)
    quantize_(model, config, filter_fn=lambda module, _name: type(module) is nn.Linear)
