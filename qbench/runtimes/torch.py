"""PyTorch: what the float network costs where it was trained, and its own compiler's integer kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.layers import named_weight_layers
from qbench.quant.matmuls import products
from qbench.registry import runtime
from qbench.runtimes import pt2e
from qbench.runtimes.base import Compiled, Device, Runtime, flatten
from qbench.runtimes.integers import NOT, is_quantized, judge


@runtime("torch")
def pytorch(
    *,
    memory_format: Literal["contiguous", "channels_last"] = "channels_last",
    compile: bool = False,
    device: Device = "cpu",
) -> Runtime:
    """PyTorch: float networks; quantized ones only if it compiles them for the CPU, with the integer kernels of PT2E.

    Uncompiled it would execute quantizers as the float arithmetic that simulates them, and refuses to.

    Args:
        memory_format: how images and weights lie in memory.
        compile: with `torch.compile`, which takes up to a minute for each network and batch size; for quantized
            networks it needs torchao.
        device: `cuda` is the first GPU, in float32; the way of images there and of answers back is part of a call.
    """
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return _Torch(formats[memory_format], compile, device)


class _Torch:
    def __init__(self, memory_format: torch.memory_format, compile: bool, device: Device) -> None:
        self._format, self._compile, self.device = memory_format, compile, device

    def compile(self, module: nn.Module, example: Tensor, *, threads: int) -> Compiled:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise Unsupported("not runnable here: PyTorch finds no GPU")
        integer, floats = judge(module) if is_quantized(module) else ((), {})
        if integer and not (self._compile and self.device == "cpu"):
            raise Unsupported(
                f"{NOT}PyTorch has an integer kernel for none of the {len(integer)} integer layers"
                " unless it compiles: torch[compile=true], on the CPU"
            )
        plain = pt2e.lower(module, integer) if integer else copy.deepcopy(module).eval().requires_grad_(False)
        network = plain.to(self.device).to(memory_format=self._format)
        layers = len(named_weight_layers(network)) + len(products(network))
        images = example.to(self.device, memory_format=self._format)
        torch.set_num_threads(threads)  # compiled code is made for as many
        called = pt2e.compiled(network, images) if self._compile else network
        run = partial(_run, called, torch.device(self.device), self._format, threads)
        if not integer:
            return Compiled(run, 0, layers, (), {})
        verified, executed = pt2e.count(partial(run, images.numpy()))
        if not verified:
            raise Unsupported(f"{NOT}PyTorch compiles none of the {len(integer)} integer layers to an integer kernel")
        return Compiled(run, verified, executed, integer, floats)


def _run(
    called: Callable[[Tensor], Any],
    device: torch.device,
    memory_format: torch.memory_format,
    threads: int,
    batch: np.ndarray,
) -> list[np.ndarray]:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with torch.no_grad():  # under inference_mode the compiler does not know some of its own kernels
        outputs = called(torch.from_numpy(batch).to(device, memory_format=memory_format))
    return [tensor.cpu().numpy() for tensor in flatten(outputs)]
