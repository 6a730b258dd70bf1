"""A float network through OpenVINO: faster scoring on CPUs, used only where its answers agree with PyTorch's."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_TOLERANCE = 1e-4
"""Largest difference of an output, as a share of the largest output."""


class Refused(Exception):  # noqa: N818  an answer, not a failure: the caller runs the network in PyTorch
    """The network does not run in OpenVINO with the same answers; the message says why."""


class Compiled:
    """A compiled network for batches of one size; smaller ones are filled up."""

    def __init__(self, network: Any, batch_size: int, bare: bool) -> None:
        self._network, self._batch_size, self._bare = network, batch_size, bare

    def __call__(self, x: Tensor) -> Any:
        missing = self._batch_size - len(x)
        filled = torch.cat([x, x[-1:].expand(missing, -1, -1, -1)]) if missing else x
        # Channels last is what the images are in memory, so this copies nothing.
        results = self._network(np.ascontiguousarray(filled.permute(0, 2, 3, 1).numpy()))
        outputs = [torch.from_numpy(results[i].copy())[: len(x)] for i in range(len(results))]
        return outputs[0] if self._bare else outputs


def compile(module: nn.Module, example: Tensor, threads: int) -> Compiled:
    """Convert and compile a network, and compare it with PyTorch on the example.

    Args:
        module: in evaluation mode, on the CPU; one input, and a tensor or a tuple of tensors as output.
        example: a batch (B, C, H, W) of real images; batches to come are at most as large.
        threads: cores to use.

    Raises:
        Refused: OpenVINO is not installed, cannot convert the network, or does not agree with PyTorch.
    """
    try:
        import openvino
    except ImportError:
        raise Refused("openvino is not installed") from None
    with torch.inference_mode():
        expected = module(example)
    wanted = [expected] if isinstance(expected, Tensor) else expected
    if not isinstance(wanted, (list, tuple)) or not all(_batched(part, len(example)) for part in wanted):
        raise Refused("the output is neither a tensor nor a tuple of tensors, a row for each image")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracing that openvino itself chose
            converted = openvino.convert_model(module, example_input=example)
        compiled = Compiled(_compile(openvino, converted, example, threads), len(example), isinstance(expected, Tensor))
        answer = compiled(example)
    except Exception as error:
        raise Refused(f"openvino cannot run it: {type(error).__name__}") from error
    found = [answer] if isinstance(answer, Tensor) else answer
    if len(found) != len(wanted) or not all(map(_agrees, found, wanted)):
        raise Refused("openvino does not agree with PyTorch on the first batch")
    return compiled


def _compile(openvino: Any, converted: Any, example: Tensor, threads: int) -> Any:
    converted.reshape(list(example.shape))
    steps = openvino.preprocess.PrePostProcessor(converted)
    steps.input().tensor().set_layout(openvino.Layout("NHWC"))
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,  # runs side by side would all sit on the first core
    }
    return openvino.Core().compile_model(steps.build(), "CPU", settings)


def _batched(part: Any, count: int) -> bool:
    return isinstance(part, Tensor) and part.dim() > 0 and len(part) == count


def _agrees(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    close = (found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max()
    return bool(close) and (wanted.dim() != 2 or torch.equal(found.argmax(1), wanted.argmax(1)))
