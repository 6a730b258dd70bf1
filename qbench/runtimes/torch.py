"""PyTorch on the CPU: what the float network costs where it was trained. Quantized networks are simulations there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.layers import named_weight_layers
from qbench.quant.matmuls import products
from qbench.registry import runtime
from qbench.runtimes.base import Compiled, Runtime, flatten
from qbench.runtimes.integers import NOT, is_quantized, judge


@runtime("torch")
def pytorch(
    *, memory_format: Literal["contiguous", "channels_last"] = "channels_last", compile: bool = False
) -> Runtime:
    """PyTorch on the CPU, for float networks: it would execute quantizers as the float arithmetic that simulates them.

    Args:
        memory_format: how images and weights lie in memory.
        compile: with `torch.compile`, which takes up to a minute for each network and batch size.
    """
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return _Torch(formats[memory_format], compile)


class _Torch:
    device: Literal["cpu", "cuda"] = "cpu"

    def __init__(self, memory_format: torch.memory_format, compile: bool) -> None:
        self._format, self._compile = memory_format, compile

    def compile(self, module: nn.Module, example: Tensor, *, threads: int) -> Compiled:
        if is_quantized(module):
            integer, _ = judge(module)
            raise Unsupported(f"{NOT}PyTorch has an integer kernel for none of the {len(integer)} integer layers")
        network = copy.deepcopy(module).cpu().eval().requires_grad_(False).to(memory_format=self._format)
        called: Callable[[Tensor], Any] = torch.compile(network) if self._compile else network
        run = _runner(called, self._format, threads)
        try:
            run(example.cpu().numpy())
        except RuntimeError as error:
            raise Unsupported(f"PyTorch cannot compile the network: {str(error).partition(chr(10))[0]}") from error
        return Compiled(run, 0, len(named_weight_layers(network)) + len(products(network)), (), {})


def _runner(called: Callable[[Tensor], Any], memory_format: torch.memory_format, threads: int) -> Any:
    def run(batch: np.ndarray) -> list[np.ndarray]:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            outputs = called(torch.from_numpy(batch).contiguous(memory_format=memory_format))
        return [tensor.numpy() for tensor in flatten(outputs)]

    return run
