"""Structural changes as named, replayable operations, recorded with the model.

An operation changes the modules of a model (folds a batch norm away, splits a layer) given JSON-able arguments. It is
recorded, so that an artifact is rebuilt from architecture, operations and stored tensors, with no pickled code.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from qbench.errors import UserError

Operation = Callable[..., None]
_OPERATIONS: dict[str, Operation] = {}
_RECORD = "qbench_structure"
_BUILT_IN = {
    "add_bias": "qbench.quant.biases",
    "channel_clip": "qbench.quant.channel_clip",
    "drop_rectifier": "qbench.quant.rectifiers",
    "expose_edges": "qbench.quant.edges",
    "expose_matmuls": "qbench.quant.matmuls",
    "expose_output": "qbench.quant.outputs",
    "fold_bn": "qbench.quant.folding",
    "reparameterize": "qbench.quant.merging",
    "rprelu": "qbench.quant.rectifiers",
    "scale_map": "qbench.quant.scale_map",
    "select_channels": "qbench.quant.channel_selection",
    "shortcuts": "qbench.quant.shortcuts",
    "split_channels": "qbench.quant.splitting",
}


def operation(name: str) -> Callable[[Operation], Operation]:
    """Register `(model, **arguments) -> None`; it must work on a fresh architecture whose weights come later."""

    def decorate(function: Operation) -> Operation:
        _OPERATIONS[name] = function
        return function

    return decorate


def apply(model: nn.Module, name: str, **arguments: Any) -> None:
    """Perform the operation on the model and record it.

    Raises:
        UserError: no such operation is registered.
    """
    if name in _BUILT_IN:
        import_module(_BUILT_IN[name])
    if name not in _OPERATIONS:
        raise UserError(f"unknown structural operation {name!r}: load the plugin that defines it")
    _OPERATIONS[name](model, **arguments)
    model.__dict__.setdefault(_RECORD, []).append({"operation": name, **arguments})


def record(model: nn.Module) -> list[dict[str, Any]]:
    """The operations applied so far, in order."""
    return list(model.__dict__.get(_RECORD, []))


def replay(model: nn.Module, operations: list[dict[str, Any]]) -> None:
    """Perform recorded operations on a fresh architecture."""
    for entry in operations:
        arguments = dict(entry)
        apply(model, arguments.pop("operation"), **arguments)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module called `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
