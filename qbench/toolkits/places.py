"""Where a toolkit's quantizers are in the network: its graph, operation by operation, against the network's modules.

Toolkits put quantizers on edges of a graph, here they are attached to the inputs of modules. An edge is the input of
a convolution or linear layer, of an exposed sum, product or concatenation, or of a module that is one operation. What
only moves, drops or compares values, such as a ReLU or max pooling, commutes with a quantizer: one in front of it
counts behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.edges import Join
from qbench.quant.encodings import Affine
from qbench.quant.layers import WEIGHT_LAYERS
from qbench.quant.matmuls import MatMul
from qbench.quant.outputs import OUTPUT

_PASSED = ("quantizer", "through", "moves")


@dataclass(frozen=True)
class Grid:
    """A static quantizer: `(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale`."""

    scale: tuple[float, ...]
    """One, or one a channel (axis 1)."""
    zero_point: tuple[int, ...]
    low: int
    high: int


@dataclass(frozen=True)
class Step:
    """An operation of the graph.

    Attributes:
        kind: a `quantizer` (or the half of it that decodes); `through` or `moves`, which commute with quantizers, but
            that `moves` changes which axis is that of the channels; a `layer` with a weight; or any `other`.
        operation: its type, as the toolkit calls it.
        inputs: the values that it reads; None for constants.
        module: whose code it is, by name.
        grid: of a quantizer's first half.
        parameters: of the module, as the toolkit left them, by their names in it.
    """

    kind: Literal["quantizer", "through", "moves", "layer", "other"]
    operation: str
    inputs: tuple[str | None, ...]
    module: str = ""
    grid: Grid | None = None
    parameters: Mapping[str, Affine | Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """A quantized network as a toolkit returns it: what makes each value, in order of execution."""

    toolkit: str
    steps: Mapping[str, Step]
    outputs: tuple[str, ...]

    def parameters(self) -> dict[str, Affine | Tensor]:
        """Those that the toolkit quantized or changed, by full name.

        Raises:
            Unsupported: a parameter is used twice, in two ways.
        """
        found: dict[str, Affine | Tensor] = {}
        for step in self.steps.values():
            for name, value in step.parameters.items():
                full = f"{step.module}.{name}" if step.module else name
                if full in found and not _same(found[full], value):
                    raise Unsupported(f"{self.toolkit} quantizes {full} in two ways, for two calls")
                found[full] = value
        return found

    def quantizers(self, model: nn.Module) -> dict[str, Grid]:
        """The quantizer of each module's input, by the module's name; `OUTPUT` is that of the network's output.

        Args:
            model: the network from which the toolkit's was made, with sums, products and concatenations exposed.

        Raises:
            Unsupported: there is one where no module's input is.
        """
        found: dict[str, Grid] = {}
        for place, grid in self._placed(model):
            if found.setdefault(place, grid) != grid:
                raise Unsupported(f"{self.toolkit} quantizes the input of {place} in two ways, for two calls")
        return found

    def _placed(self, model: nn.Module) -> Iterator[tuple[str, Grid]]:
        for step in self.steps.values():
            if step.kind in _PASSED:
                continue
            for position, value in enumerate(step.inputs):
                grid = self._grid(value)
                if grid is not None:
                    yield self._place(model, step, position), grid
        for value in self.outputs:
            grid = self._grid(value)
            if grid is not None:
                if len(self.outputs) > 1:
                    raise Unsupported(f"{self.toolkit} quantizes an output, of which the network has several")
                yield OUTPUT, grid

    def _grid(self, value: str | None) -> Grid | None:
        """The quantizer that a value has passed.

        Raises:
            Unsupported: it has passed two that differ.
        """
        grid: Grid | None = None
        moved = False
        for step in self._passed(value):
            moved |= step.kind == "moves"
            if step.grid is not None and grid not in (None, step.grid):
                raise Unsupported(f"{self.toolkit} has two quantizers in a row, that differ, in front of {value}")
            grid = step.grid or grid
            if moved and grid is not None and len(grid.scale) > 1:
                raise Unsupported(f"{self.toolkit} moves channels that have a scale each, in front of {value}")
        return grid

    def _passed(self, value: str | None) -> Iterator[Step]:
        """The quantizers that a value has passed, and what commutes with them, the last one first."""
        while value is not None and value in self.steps and self.steps[value].kind in _PASSED:
            yield self.steps[value]
            value = self.steps[value].inputs[0]

    def _place(self, model: nn.Module, step: Step, position: int) -> str:
        module = model.get_submodule(step.module)
        if isinstance(module, Join):
            return f"{step.module}.edges.{position}"
        if isinstance(module, MatMul):
            return f"{step.module}.{('left', 'right')[position]}"
        if isinstance(module, WEIGHT_LAYERS) and step.kind == "layer":
            return step.module
        # Only the first operand of the first operation is what a module is called with.
        if position or any(module.children()) or self._producer(step.inputs[position]) == step.module:
            where = f"{step.module or 'the network'} ({type(module).__name__})"
            raise Unsupported(f"{self.toolkit} quantizes an operand of {step.operation} inside of {where}")
        return step.module

    def _producer(self, value: str | None) -> str | None:
        """The module that made a value, past quantizers and what commutes with them; None for the network's input."""
        for step in self._passed(value):
            value = step.inputs[0]
        return self.steps[value].module if value is not None and value in self.steps else None


def _same(a: Affine | Tensor, b: Affine | Tensor) -> bool:
    left, right = (value.decode() if isinstance(value, Affine) else value for value in (a, b))
    return torch.equal(left, right)
