"""Activation quantizers: modules attached to a layer's input, static or dynamic, of any bit width.

They simulate integers in float (quantize, then dequantize); torch.export, torch.jit and OpenVINO trace through them.
The operands of products of activations are inputs of modules, too (`qbench.quant.matmuls`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qbench.quant.binary_quantizer import BinaryMeanQuantizer, BinaryQuantizer
from qbench.quant.calls import Args, with_first
from qbench.quant.level_quantizer import LevelQuantizer
from qbench.quant.log_quantizer import LogQuantizer
from qbench.quant.quantizer import Quantizer
from qbench.quant.twin_quantizers import TwinGelu, TwinSoftmax

_NAME = "input_quantizer"


class StaticQuantizer(Quantizer):
    """Affine quantizer per tensor with a fixed scale and zero point."""

    kind: ClassVar[str] = "static"
    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int = 8, symmetric: bool = False, scale: float = 1.0, zero_point: int = 0) -> None:
        """Codes of `bits` bits span the full signed range if symmetric, else [0, 2**bits - 1].

        Args:
            bits: width of the codes.
            symmetric: signed codes with zero point 0.
            scale: step, in units of the activation.
            zero_point: code of 0.
        """
        super().__init__(bits)
        self.symmetric = symmetric
        self.low: int = -(2 ** (bits - 1)) if symmetric else 0
        self.high: int = self.low + 2**bits - 1
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("zero_point", torch.tensor(int(zero_point), dtype=torch.int32))

    def config(self) -> dict[str, Any]:
        return {**super().config(), "symmetric": self.symmetric}

    def forward(self, x: Tensor) -> Tensor:
        # Many times faster on a CPU than torch's own operator, which takes one number at a time.
        codes = (x * self.scale.reciprocal()).round_()
        return codes.clamp_(self.low - self.zero_point, self.high - self.zero_point).mul_(self.scale)


class ChannelQuantizer(Quantizer):
    """Affine quantizer with a fixed scale and zero point for each channel (axis 1)."""

    kind: ClassVar[str] = "channel"
    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int = 8, channels: int = 1) -> None:
        """Codes of `bits` bits in [0, 2**bits - 1]; scales of 1 and zero points of 0, to be set.

        Args:
            bits: width of the codes.
            channels: how many there are.
        """
        super().__init__(bits)
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", torch.zeros(channels, dtype=torch.int32))

    def config(self) -> dict[str, Any]:
        return {**super().config(), "channels": len(self.scale)}

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *(1 for _ in x.shape[2:]))
        scale, zero = self.scale.view(shape), self.zero_point.view(shape)
        codes = (x * scale.reciprocal()).round_()
        return codes.clamp_(-zero, 2**self.bits - 1 - zero).mul_(scale)


class DynamicQuantizer(Quantizer):
    """Quantizer whose scale is computed at run time from the range, per image or per token (last axis)."""

    kind: ClassVar[str] = "dynamic"

    def __init__(self, bits: int = 8, symmetric: bool = False, granularity: str = "tensor") -> None:
        super().__init__(bits)
        self.symmetric, self.granularity = symmetric, granularity

    def config(self) -> dict[str, Any]:
        return {**super().config(), "symmetric": self.symmetric, "granularity": self.granularity}

    def forward(self, x: Tensor) -> Tensor:
        # Per image, never per batch: an image's answer must not depend on its neighbours in the batch.
        axes = (x.dim() - 1,) if self.granularity == "token" else tuple(range(1, x.dim()))
        high, low = x.amax(axes, keepdim=True).clamp(min=0), x.amin(axes, keepdim=True).clamp(max=0)
        if self.symmetric:
            top = 2 ** (self.bits - 1) - 1
            scale = (torch.maximum(high, -low) / top).clamp(min=1e-12)
            return (x / scale).round().clamp(-top - 1, top) * scale
        top = 2**self.bits - 1
        scale = ((high - low) / top).clamp(min=1e-12)
        zero = (-low / scale).round()
        return ((x / scale).round() + zero).clamp(0, top).sub(zero) * scale


_CLASSES: tuple[type[Quantizer], ...] = (
    StaticQuantizer,
    ChannelQuantizer,
    DynamicQuantizer,
    LogQuantizer,
    LevelQuantizer,
    TwinSoftmax,
    TwinGelu,
    BinaryQuantizer,
    BinaryMeanQuantizer,
)
_KINDS = {cls.kind: cls for cls in _CLASSES}


def _quantize(layer: nn.Module, args: Args, kwargs: dict[str, Any]) -> tuple[Args, dict[str, Any]]:
    return with_first(args, kwargs, layer.get_submodule(_NAME))


def quantize_input(layer: nn.Module, quantizer: nn.Module) -> None:
    """Attach a quantizer to the input of a layer, in place of the one it has."""
    if not hasattr(layer, _NAME):
        layer.register_forward_pre_hook(_quantize, with_kwargs=True)
    layer.add_module(_NAME, quantizer.train(layer.training))


def input_quantizer(layer: nn.Module) -> nn.Module | None:
    """The quantizer attached to the layer's input."""
    return layer._modules.get(_NAME)


def input_quantizers(model: nn.Module) -> dict[str, nn.Module]:
    """Every attached quantizer by the name of its layer."""
    found = {name: input_quantizer(module) for name, module in model.named_modules()}
    return {name: quantizer for name, quantizer in found.items() if quantizer is not None}


def describe(quantizer: nn.Module) -> dict[str, Any]:
    """Kind and configuration, from which `build` makes an equal one but for its buffers."""
    return {"kind": quantizer.kind, **quantizer.config()}  # type: ignore[operator]


def build(description: dict[str, Any]) -> nn.Module:
    """An activation quantizer from its description."""
    arguments = dict(description)
    return _KINDS[arguments.pop("kind")](**arguments)
