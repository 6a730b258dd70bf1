"""What a runtime plugin returns: something that compiles a module for real execution, and says what it made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor, nn

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Compiled:
    """A network ready to run."""

    run: Callable[[np.ndarray], list[np.ndarray]]
    """One batch of the example's shape and dtype to the outputs, flattened, in the module's order."""
    integer_layers: int
    """Convolutions and matrix products that execute an integer kernel, as the runtime itself reports."""
    compute_layers: int
    """All convolutions and matrix products that the runtime reports."""
    claimed_layers: tuple[str, ...]
    """Layers that have integer weights and integer inputs, by the model's encodings and quantizers."""
    float_layers: Mapping[str, str]
    """Layers that run in float, and why; a claimed one is among them where the runtime has no integer kernel for it."""


class Runtime(Protocol):
    """Executes a network for real. `device` says whose energy it uses."""

    device: Device

    def compile(self, module: nn.Module, example: Tensor, *, threads: int) -> Compiled:
        """Compile for batches like `example`; the module is left as it was.

        Args:
            module: a float network, or one with encodings and input quantizers attached.
            example: a batch (B, C, H, W), float32.
            threads: that it may use.

        Raises:
            Unsupported: the network is quantized in a way that this runtime can only simulate.
        """


def flatten(outputs: Any) -> list[Tensor]:
    """The tensors of nested lists, tuples and dicts, in order: the order of `Compiled.run`."""
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [tensor for value in values for tensor in flatten(value)]


def unflatten(template: Any, tensors: Iterable[Tensor]) -> Any:
    """The inverse of `flatten`: the tensors in lists, tuples and dicts like those of the template."""
    return _refill(template, iter(tensors))


def _refill(template: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(template, Tensor):
        return next(tensors)
    if isinstance(template, Mapping):
        return {key: _refill(value, tensors) for key, value in template.items()}
    filled = [_refill(value, tensors) for value in template]
    return filled if isinstance(template, list) else tuple(filled)
