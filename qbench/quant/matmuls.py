"""Products of activations (attention) as modules, so that quantizers can be attached to their operands.

Attention multiplies queries with keys, and its softmax with values, inside of its own forward function. `expose` makes
each such product a `MatMul` module, whose two operands pass a module each: to quantize an operand is to quantize the
input of that module, as it is for a layer. The float function stays.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant import structure
from qbench.quant.exposing import Watch, call_instead, rewrite, trace
from qbench.quant.layers import WEIGHT_LAYERS, within

_PRODUCTS = {"bmm", "baddbmm"}
_FUSED = ("_scaled_dot_product", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")
_CALLS = {operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"}


class Operand(nn.Module):
    """What an operand of a product passes; its input can be quantized."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class MatMul(nn.Module):
    """The product of two activations, `left @ right`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Operand(), Operand()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        product: Tensor = self.left(left) @ self.right(right)
        return product


def products(model: nn.Module) -> dict[str, MatMul]:
    """The exposed products by name, in registration order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MatMul)}


def operands(model: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, Operand]:
    """The operands of exposed products by name, but for those whose name equals or begins with one of `skip`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Operand) and not any(within(name, prefix) for prefix in skip)
    }


def expose(model: nn.Module, example: Tensor) -> None:
    """Make every product of activations a `MatMul`, by recorded operations; what is exposed already is left alone.

    Args:
        model: in evaluation mode; changed in place.
        example: an input of the model, a batch of one.

    Raises:
        Unsupported: there are no such products, or those of a module cannot be taken out of its forward function.
    """
    watch = Watch(model, _recognise, (MatMul, *WEIGHT_LAYERS))
    watch.run(example)
    for name in watch.found:
        structure.apply(model, "expose_matmuls", module=name, constants=watch.constants(name))
    if not products(model):
        raise Unsupported("the model multiplies no activations with each other: it has no attention")


def _recognise(operation: str, args: tuple[Any, ...], watch: Watch) -> str | None:
    product = operation in _PRODUCTS and watch.computed(*args[-2:])
    return "matmul" if product or operation.startswith(_FUSED) else None


@structure.operation("expose_matmuls")
def _expose(model: nn.Module, *, module: str, constants: dict[str, Any]) -> None:
    """Rewrite the forward function of one module; `constants` are its arguments that are no tensors."""
    attention = model.get_submodule(module)
    where = f"the attention {module} ({type(attention).__name__})"
    if hasattr(attention, "fused_attn"):
        vars(attention)["fused_attn"] = False
    graph = trace(attention, constants, where)
    found = [node for node in graph.nodes if node.target in _CALLS and all(a.op != "get_attr" for a in node.args[:2])]
    if not found:
        raise Unsupported(f"{where} multiplies inside of a function that cannot be taken apart")
    for number, node in enumerate(found):
        call_instead(attention, graph, node, f"matmul{number}", MatMul(), *node.args[:2])
    rewrite(attention, graph)
