"""Quantizers that training goes through, and putting them on a model and taking them off again.

A weight quantizer is a parametrization of the weight that also says how the weight is encoded in the end; an input
quantizer also says which fixed quantizer it becomes. Whoever trains attaches them, calls `fit`, then `deploy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qbench.models.base import first_device
from qbench.quant.activations import StaticQuantizer, input_quantizers, quantize_input
from qbench.quant.encodings import Affine, Encoding
from qbench.quant.hooks import hooked
from qbench.quant.layers import encode, named_weight_layers
from qbench.quant.rows import sharing_rows, spread

Granularity = Literal["tensor", "channel"]
SMALLEST = 1e-8
"""Steps do not become smaller than this."""


class LearnedStep(torch.autograd.Function):
    """`round(clip(x / scale, low, high)) * scale` with the gradients of LSQ (arXiv:1902.08153).

    The gradient passes to x inside the range; the scale gets `round(x / s) - x / s` inside and the bound outside, times
    `gain`. Written in few passes over memory: on the CPU that is 10 times faster than the built-in fused operator.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, gain: float) -> Tensor:
        """x of any shape, scale broadcastable to it."""
        # The reciprocal, because that is what the fixed quantizers of the deployed model multiply with.
        y = (x * scale.reciprocal()).round_().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, y, scale)
        ctx.low, ctx.high, ctx.gain = low, high, gain
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, y, scale = ctx.saved_tensors
        if grad.stride() != x.stride():
            # Convolutions like another order than their weight's: several mixed passes cost more than one copy.
            grad = torch.empty_like(x).copy_(grad)
        inside = torch.ops.aten.hardtanh_backward(grad, x * scale.reciprocal(), ctx.low, ctx.high)
        if not ctx.needs_input_grad[1]:
            return inside, None, None, None, None
        # Outside the range y / scale is the bound and `inside` is 0, so one formula covers both.
        total = _inner(grad, y, scale) - _inner(inside, x, scale)
        return inside, total.div_(scale).mul_(ctx.gain), None, None, None


def _inner(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """The sum of a * b, which lie in memory in the same order, over the axes along which `like` is constant."""
    if like.numel() > 1:
        return (a * b).sum_to_size(like.shape)
    if a.is_contiguous() or (a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last)):
        # One pass without a temporary.
        return torch.dot(*(t.as_strided((t.numel(),), (1,)) for t in (a, b))).reshape(like.shape)
    return (a * b).sum().reshape(like.shape)


class WeightQuantizer(Protocol):
    """A parametrization of a weight."""

    def __call__(self, weight: Tensor) -> Tensor: ...
    def encoding(self, quantized: Tensor) -> Encoding:
        """What the quantized weight is stored as."""


class InputQuantizer(Protocol):
    """A module through which the input of a layer goes; all that it learns is part of its state."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def deployed(self) -> nn.Module:
        """The fixed quantizer that does the same, one of `qbench.quant.activations`."""


Start = Callable[[Tensor, int], Tensor]
"""`(rows (R, n), largest code) -> first steps (R,)`"""


def lsq_start(rows: Tensor, high: int) -> Tensor:
    """2 mean|w| / sqrt(high), as LSQ begins."""
    return 2 * rows.abs().mean(1) / math.sqrt(high)


class LearnedWeight(nn.Module):
    """LSQ on a weight: signed codes, one learned step per tensor or per output channel."""

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        granularity: Granularity,
        axis: int = 0,
        *,
        narrow: bool = False,
        start: Start = lsq_start,
    ) -> None:
        """
        Args:
            weight: its first steps are those of `start`, or 1 where that is 0.
            bits: width of the codes, at least 2.
            granularity: one step per tensor or per output channel.
            axis: output-channel axis of the weight.
            narrow: leave the lowest code out, which has no counterpart above 0.
            start: the first steps for rows that share one, and the largest code.
        """
        super().__init__()
        self.high, self.axis = 2 ** (bits - 1) - 1, axis
        self.low = -self.high - (not narrow)
        rows = sharing_rows(weight.detach(), granularity, axis)
        first = start(rows, self.high)
        self.scale = nn.Parameter(spread(torch.where(first > SMALLEST, first, 1.0), weight.dim(), axis))
        self.gain = 1 / math.sqrt(rows.shape[1] * self.high)

    def forward(self, weight: Tensor) -> Tensor:
        return cast(Tensor, LearnedStep.apply(weight, self.scale, self.low, self.high, self.gain))

    def encoding(self, quantized: Tensor) -> Encoding:
        return Affine.nearest(quantized, self.scale.detach().flatten(), low=self.low, high=self.high, axis=self.axis)


class FirstBatchInput(nn.Module):
    """A quantizer of a layer's input that sets itself from the first batch, which also decides about the sign.

    Codes have the full range. Where the first batch has negative values they are signed, if they are `symmetric`.
    """

    symmetric: ClassVar[bool] = True

    def __init__(self, bits: int) -> None:
        """
        Args:
            bits: width of the codes.
        """
        super().__init__()
        self.bits, self.low, self.high, self.gain = bits, 0, 2**bits - 1, 1.0
        self.used = False

    @property
    def signed(self) -> bool:
        return self.low < 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.used:
            if self.symmetric and x.amin() < 0:
                self.low, self.high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
            with torch.no_grad():
                self.begin(x.detach())
            self.used = True
        return self.quantized(x)

    def get_extra_state(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "gain": self.gain, "used": self.used}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.low, self.high, self.gain, self.used = state["low"], state["high"], state["gain"], state["used"]

    def begin(self, x: Tensor) -> None:
        """Set everything from the first batch."""
        raise NotImplementedError

    def quantized(self, x: Tensor) -> Tensor:
        """The input, quantized."""
        raise NotImplementedError


class LearnedInput(FirstBatchInput):
    """LSQ on a layer's input: one learned step."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.scale = nn.Parameter(torch.ones(()))

    def begin(self, x: Tensor) -> None:
        first = 2 * x.abs().mean() / math.sqrt(max(1, self.high))
        self.scale.copy_(first if first > SMALLEST else torch.ones_like(first))
        self.gain = 1 / math.sqrt(x[0].numel() * max(1, self.high))

    def quantized(self, x: Tensor) -> Tensor:
        return cast(Tensor, LearnedStep.apply(x, self.scale, self.low, self.high, self.gain))

    def deployed(self) -> StaticQuantizer:
        """The fixed quantizer with the learned step."""
        return StaticQuantizer(self.bits, self.signed, self.scale.item())


def quantize_weight(layer: nn.Module, quantizer: nn.Module) -> None:
    """Make every use of the layer's weight go through the quantizer, a `WeightQuantizer`."""
    parametrize.register_parametrization(layer, "weight", quantizer)


def weight_quantizer(layer: nn.Module) -> nn.Module | None:
    """The quantizer that the layer's weight goes through."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return layer.get_submodule("parametrizations.weight.0")


def reached(model: nn.Module, x: Tensor) -> set[str]:
    """The layers that are called on the way of x; a model may use the weight of others without calling them."""
    seen: set[str] = set()
    handles = (
        layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: seen.add(name))
        for name, layer in named_weight_layers(model).items()
    )
    with hooked(handles), torch.no_grad():
        model(x)
    return seen


def quantizers(model: nn.Module) -> dict[str, nn.Module]:
    """All that is to be deployed, by the name of its weight or input."""
    weights = {f"{name}.weight": weight_quantizer(layer) for name, layer in named_weight_layers(model).items()}
    inputs = {f"{name}.input": quantizer for name, quantizer in input_quantizers(model).items()}
    return {name: q for name, q in (weights | inputs).items() if q is not None and _is_learned(q)}


def _is_learned(module: nn.Module) -> bool:
    """Whether it is a `WeightQuantizer` or an `InputQuantizer`."""
    return hasattr(module, "encoding") or hasattr(module, "deployed")


def keep_positive(model: nn.Module) -> None:
    """Pull those parameters `scale` of quantizers, or those named in `kept_positive`, up that have become too small."""
    with torch.no_grad():
        for module in filter(_is_learned, model.modules()):
            for name in getattr(module, "kept_positive", ("scale",)):
                parameter = module._parameters.get(name)
                if parameter is not None:
                    parameter.clamp_(min=SMALLEST)


def detach(model: nn.Module) -> None:
    """Take the quantizers of weights off again: what is left are the weights behind them."""
    for layer in named_weight_layers(model).values():
        if weight_quantizer(layer) is not None:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def deploy(model: nn.Module) -> None:
    """Put what was learned in place of the quantizers: encodings, and fixed input quantizers."""
    found: dict[int, Encoding] = {}
    for layer in named_weight_layers(model).values():
        quantizer = weight_quantizer(layer)
        if quantizer is not None and hasattr(quantizer, "encoding"):
            # A weight that layers share is gone once the first of them is encoded.
            shared = id(layer.get_parameter("parametrizations.weight.original"))
            if shared not in found:
                found[shared] = cast(WeightQuantizer, quantizer).encoding(cast(Tensor, layer.weight).detach())
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            encode(layer, found[shared])
    for name, learned in input_quantizers(model).items():
        if hasattr(learned, "deployed"):
            quantize_input(
                model.get_submodule(name), cast(InputQuantizer, learned).deployed().to(first_device(learned))
            )
