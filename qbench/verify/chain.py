"""Linear layers with ReLU between them, quantized in any uniform way, in the form that the exact program takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qbench.errors import Unsupported
from qbench.models.base import Preprocess
from qbench.verify.differences import Stage
from qbench.verify.exact import Grid, Scaled, Twins
from qbench.verify.fixed_point import layer_of
from qbench.verify.graph import Graph, Operation
from qbench.verify.interval import Interval
from qbench.verify.reach import Reached, codes

_IN_ORDER = (nn.Flatten, nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class Link:
    """A layer, with the quantizer in front of it and the ReLU behind it, where they are."""

    quantizer: Operation | None
    linear: Operation
    relu: Operation | None


def links(graph: Graph) -> list[Link]:
    """A network's layers, one after the other.

    Raises:
        Unsupported: it is something else than linear layers with ReLU between them.
    """
    found = list(_links(graph.operations))
    in_a_row = all(operation.operands == (place,) for place, operation in enumerate(graph.operations))
    if not in_a_row or any((link.relu is None) != (link is found[-1]) for link in found):
        raise Unsupported("the exact program is for linear layers with ReLU between them")
    return found


def _links(operations: Sequence[Operation]) -> Iterator[Link]:
    rest = [operation for operation in operations if not isinstance(operation.function, _IN_ORDER)]
    while rest:
        quantizer = rest.pop(0) if rest[0].kind == "quantizer" else None
        if not rest or not isinstance(rest[0].function, nn.Linear):
            what = rest[0].name if rest else "a quantizer at the end"
            raise Unsupported(f"the exact program is for linear layers with ReLU between them, not for {what}")
        linear = rest.pop(0)
        yield Link(quantizer, linear, rest.pop(0) if rest and rest[0].kind == "relu" else None)


def twins(chain: Sequence[Link], counterparts: Mapping[str, Operation], preprocess: Preprocess) -> Twins:
    """Both networks, for pixels of images that are prepared so.

    Args:
        chain: of the quantized network.
        counterparts: the float network's operations by the names of the quantized one's.
        preprocess: of both.
    """
    layers = [layer_of(counterparts[link.linear.name].function) for link in chain]
    grids = [_grid(link.quantizer) for link in chain]
    repeats = layers[0].weight.shape[1] // preprocess.channels
    mean, std = (
        torch.tensor(values, dtype=torch.float64).repeat_interleave(repeats)
        for values in (preprocess.mean, preprocess.std)
    )
    scale, offset = 1 / (255 * std), -mean / std
    inputs = Scaled(scale, offset), Scaled(scale, offset, grids[0])
    return Twins(layers, [layer_of(link.linear.function) for link in chain], grids[1:], inputs)


def _grid(quantizer: Operation | None) -> Grid | None:
    if quantizer is None:
        return None
    low, high, step = codes(quantizer.function)
    return Grid(step, low, high)


def stages(chain: Sequence[Link], reached: Mapping[str, Reached]) -> list[Stage]:
    """What is known behind each layer.

    Args:
        chain: of the quantized network.
        reached: what was found behind every operation, for one image.
    """
    following = [*(link.quantizer for link in chain[1:]), None]
    return [_stage(link, quantizer, reached) for link, quantizer in zip(chain, following, strict=True)]


def _stage(link: Link, quantizer: Operation | None, reached: Mapping[str, Reached]) -> Stage:
    here, behind = reached[link.linear.name], reached[(quantizer or link.relu or link.linear).name]
    fixed, grid = _first(here.quantized), _grid(quantizer)
    if grid is not None:
        ends = [grid.around(*pair) for pair in zip(fixed.low.tolist(), fixed.high.tolist(), strict=True)]
        fixed = Interval(*(grid.step * torch.tensor(ends, dtype=torch.float64)).T)
    return Stage(_first(here.floats), fixed, _first(behind.difference))


def _first(intervals: Interval) -> Interval:
    return Interval(intervals.low[0], intervals.high[0])
