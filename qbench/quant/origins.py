"""Which layers read what an operation returns, as it is: a quantizer can then be made for its distribution."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from qbench.quant.adjacency import memory_of
from qbench.quant.calls import Args, first_of
from qbench.quant.hooks import hooked


def origins(model: nn.Module, example: Tensor, operations: Iterable[str], readers: Iterable[str]) -> dict[str, str]:
    """The operation, of those given, whose output a module is called with; modules of other inputs are left out.

    Between the two there may be views and what returns its input (dropout in evaluation mode).

    Args:
        model: in evaluation mode.
        example: an input of the model, a batch of one.
        operations: names of torch's own operations, such as `gelu` or `_softmax`.
        readers: names of the modules to look at.
    """
    watch = _Watch(set(operations))
    handles = (
        model.get_submodule(name).register_forward_pre_hook(watch.reading(name), with_kwargs=True) for name in readers
    )
    with hooked(handles), torch.no_grad(), watch:
        model(example)
    return watch.found


class _Watch(TorchDispatchMode):
    def __init__(self, operations: set[str]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._operations = operations
        self._written: dict[int, tuple[str, StorageWeakRef]] = {}

    def reading(self, name: str) -> Any:
        def read(_module: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
            where = memory_of(first_of(args, kwargs))
            if where in self._written:
                self.found[name] = self._written[where][0]

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        if operation in self._operations:
            # The weak reference keeps the address from being given to another tensor.
            self._written[memory_of(result)] = (operation, StorageWeakRef(result.untyped_storage()))
        elif func._schema.is_mutable and isinstance(result, Tensor):
            self._written.pop(memory_of(result), None)
        return result
