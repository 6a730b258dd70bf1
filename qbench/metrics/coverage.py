"""How much of the network is really quantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qbench.metrics.base import Finished
from qbench.quant.activations import input_quantizers
from qbench.quant.audit import audit
from qbench.quant.layers import WEIGHT_LAYERS, encodings, full_name
from qbench.quant.matmuls import MatMul, products
from qbench.registry import metric


@metric("coverage", unit="%", direction="higher")
def coverage(finished: Finished) -> dict[str, Any]:
    """Share of weights and of multiply-accumulates that are really quantized.

    `weights_*` are numbers of the network's parameters; `macs_*` are multiply-accumulates of one image, of which
    `weights` have quantized weights, and `both` have both factors quantized: weights and inputs, or the two operands
    of a product of activations (attention). `levels` is the audit of every encoding.
    """
    model = finished.quantized
    encoded = encodings(model)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    # By identity: a tied parameter counts once.
    quantized = {id(p): p.numel() for name, p in model.named_parameters(remove_duplicate=False) if name in encoded}
    total, by_layer = macs(model, finished.data.example)
    inputs = input_quantizers(model).keys()
    with_weights = {name: count for name, count in by_layer.items() if full_name(name, "weight") in encoded}
    both = {name for name in with_weights if name in inputs}
    both |= {name for name in products(model) if {f"{name}.left", f"{name}.right"} <= inputs}
    return {
        "value": 100 * sum(quantized.values()) / numbers,
        "weights_total": numbers,
        "weights_quantized": sum(quantized.values()),
        "macs_total": total,
        "macs_weights": sum(with_weights.values()),
        "macs_both": sum(count for name, count in by_layer.items() if name in both),
        "levels": audit(model),
    }


def macs(model: nn.Module, example: Tensor) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of one forward pass: all of them, and those of each layer and exposed product by name."""
    counter = FlopCounterMode(display=False)
    by_layer: dict[str, int] = {}
    # Attention that stays fused is counted only where it is made of single products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _counted(model, counter, by_layer), counter:
        model(example)
    return counter.get_total_flops() // 2, by_layer


@contextmanager
def _counted(model: nn.Module, counter: FlopCounterMode, by_layer: dict[str, int]) -> Iterator[None]:
    before: dict[str, int] = {}

    def enter(name: str) -> None:
        before[name] = counter.get_total_flops()

    def leave(name: str) -> None:
        by_layer[name] = by_layer.get(name, 0) + (counter.get_total_flops() - before[name]) // 2

    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, (*WEIGHT_LAYERS, MatMul)):
            hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            hooks.append(layer.register_forward_hook(lambda *_, name=name: leave(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
