"""Quantizing and dequantizing as single ONNX nodes, where tracing the arithmetic would write several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class QuantizeLinear(torch.autograd.Function):
    """`round(x / scale) + zero_point`, saturated to the integer type of the zero point."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        limits = torch.iinfo(zero_point.dtype)
        return ((x / scale).round() + zero_point).clamp(limits.min, limits.max).to(zero_point.dtype)

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero_point: Any) -> Any:
        kind = x.type().with_dtype(zero_point.type().dtype())
        return g.op("QuantizeLinear", x, scale, zero_point).setType(kind)


class DequantizeLinear(torch.autograd.Function):
    """`(codes - zero_point) * scale`; a zero point of None is 0.

    The parameters are scalars, or one for each index of `axis`, or, with a `block`, one for so many indices of it.
    """

    @staticmethod
    def forward(_ctx: Any, codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block: int) -> Tensor:
        zero = torch.zeros_like(scale) if zero_point is None else zero_point.to(scale.dtype)
        return (codes.to(scale.dtype) - _spread(zero, codes, axis, block)) * _spread(scale, codes, axis, block)

    @staticmethod
    def symbolic(g: Any, codes: Any, scale: Any, zero_point: Any, axis: int, block: int) -> Any:
        given = (codes, scale) if zero_point is None else (codes, scale, zero_point)
        attributes = {"axis_i": axis} | ({"block_size_i": block} if block else {})
        return g.op("DequantizeLinear", *given, **attributes).setType(codes.type().with_dtype(torch.float32))


def _spread(parameter: Tensor, codes: Tensor, axis: int, block: int) -> Tensor:
    if block:
        return parameter.repeat_interleave(block, dim=axis).narrow(axis, 0, codes.shape[axis])
    shape = [1] * codes.dim()
    if parameter.dim():
        shape[axis] = -1
    return parameter.reshape(shape)


def know_exp2() -> None:
    """Teach torch's exporter `exp2`, which logarithmic quantizers use."""
    torch.onnx.register_custom_op_symbolic("aten::exp2", _exp2, 9)


def _exp2(g: Any, x: Any) -> Any:
    return g.op("Pow", g.op("Constant", value_t=torch.tensor(2.0)), x).setType(x.type())
