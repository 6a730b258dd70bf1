"""PyTorch's compiler on the CPU: integer kernels of oneDNN for what is written in the operators of PT2E."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from qbench.errors import Unsupported
from qbench.quant.activations import StaticQuantizer
from qbench.quant.encodings import Affine
from qbench.runtimes.integers import IntegerInput, IntegerWeight, with_integers
from qbench.toolkits.adopt import require
from qbench.toolkits.exported import export

_INTEGER = {"onednn::qconv_pointwise", "onednn::qconv2d_pointwise", "onednn::qlinear_pointwise", "aten::_int_mm"}
_FLOAT = {
    *("aten::mkldnn_convolution", "mkldnn::_convolution_pointwise", "mkldnn::_convolution_transpose_pointwise"),
    *(
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "mkldnn::_linear_pointwise",
        "aten::convolution_overrideable",
    ),
}


def lower(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """A copy on the CPU in which the layers `names` are what the compiler's passes turn into integer kernels.

    Raises:
        Unsupported: torchao, which has those passes, is not installed.
    """
    require("torchao", "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", extra="torchao")
    return with_integers(model, names, _Weight, _Input)


def compiled(network: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    """The network compiled for batches like `example`, with its weights as constants.

    It is exported first: a graph has code of its own, whereas what is compiled of a module is forgotten, and silently
    runs uncompiled, when its class was compiled too often.

    Raises:
        Unsupported: torch cannot export it, or not compile what it exported.
    """
    called = torch.compile(export(network, example), fullgraph=True)
    try:
        # As an option of `torch.compile` this comes too late for the passes that make integer kernels.
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            called(example)
    except RuntimeError as error:
        raise Unsupported(f"PyTorch cannot compile the network: {str(error).partition(chr(10))[0]}") from error
    return called


def count(run: Callable[[], Any]) -> tuple[int, int]:
    """How many convolutions and matrix products with integer kernels, and how many of all kinds, a call executes."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    calls = {event.key: event.count for event in profiled.key_averages()}
    integer, floats = (sum(calls.get(name, 0) for name in names) for names in (_INTEGER, _FLOAT))
    return integer, integer + floats


class _Weight(IntegerWeight):
    """As `dequantize_per_channel`."""

    def __init__(self, encoding: Affine) -> None:
        super().__init__(encoding)
        self.axis = encoding.axis
        self.register_buffer("zero", torch.zeros(self.scale.numel(), dtype=torch.int64))
        self.scale = self.scale.flatten()

    def forward(self, _original: Tensor) -> Tensor:
        decode = torch.ops.quantized_decomposed.dequantize_per_channel
        weight: Tensor = decode(self.codes, self.scale, self.zero, self.axis, -128, 127, torch.int8)
        return weight


class _Input(IntegerInput):
    """As `quantize_per_tensor` and its inverse, unsigned: the kernels know no signed inputs."""

    def __init__(self, quantizer: StaticQuantizer) -> None:
        super().__init__(quantizer)
        self.unsigned_zero = self.zero_point - self.low

    def forward(self, x: Tensor) -> Tensor:
        grid = (self.scale, self.unsigned_zero, 0, 255, torch.uint8)
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(self.clip(x), *grid)
        decoded: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor(codes, *grid)
        return decoded
