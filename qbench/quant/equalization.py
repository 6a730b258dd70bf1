"""The factors of cross-layer equalization: each channel gets one range, in its writer and its readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.quant.channels import input_ranges, output_ranges, scale_inputs, scale_outputs
from qbench.quant.layers import weight_of
from qbench.quant.links import Link

_ROUNDS = 1000
_SETTLED = 2e-7
_DEAD = 1e-6  # of the layer's largest weight: below it a channel is noise, which must not be blown up


@dataclass(frozen=True)
class Equalized:
    """What `equalizing_factors` found."""

    factors: list[Tensor]
    """For each link (C,), float64: the source's channels are divided by it, the readers' inputs multiplied."""
    rounds: int
    change: float
    """Mean |log factor| of the last round."""


def equalizing_factors(layers: dict[str, nn.Module], links: Sequence[Link]) -> Equalized:
    """Factors after which, for each channel of each link, the source's range and the readers' are the same.

    Links share layers (a depthwise layer reads one and is the source of the next), so all are gone through again until
    the mean |log factor| is below 2e-7, or 1000 times. A channel that is dead on one side is scaled so far that it does
    not reach beyond the others on the other side.

    Args:
        layers: by name; not changed.
        links: between them.
    """
    weights = {name: weight_of(layers[name]).double() for link in links for name in (link.source, *link.readers)}
    totals = [torch.zeros_like(output_ranges(layers[link.source], weights[link.source])) for link in links]
    rounds, change = 0, float("inf") if links else 0.0
    while change >= _SETTLED and rounds < _ROUNDS:
        moves = []
        for link, total in zip(links, totals, strict=True):
            factor = _factor(layers, weights, link, total)
            weights[link.source] = scale_outputs(layers[link.source], weights[link.source], 1 / factor)
            for name in link.readers:
                weights[name] = scale_inputs(layers[name], weights[name], factor)
            total += factor.log()
            moves.append(factor.log().abs())
        rounds, change = rounds + 1, float(torch.cat(moves).mean())
    return Equalized([total.exp() for total in totals], rounds, change)


def _factor(layers: dict[str, nn.Module], weights: dict[str, Tensor], link: Link, total: Tensor) -> Tensor:
    own = output_ranges(layers[link.source], weights[link.source])
    read = torch.stack([input_ranges(layers[name], weights[name]) for name in link.readers]).amax(0)
    writes, reads = own > _DEAD * own.max(), read > _DEAD * read.max()
    alive = writes & reads
    if not alive.any():
        return torch.ones_like(own)
    factor = torch.where(alive, (own / read).sqrt(), 1.0)
    top = (own * read).sqrt()[alive].max()
    factor = torch.where(
        reads & ~writes, torch.maximum(top / read, _least(layers[link.source], factor, alive, total)), factor
    )
    factor = torch.where(reads & ~writes, factor.clamp(max=1), factor)
    factor = torch.where(writes & ~reads, (own / top).clamp(min=1), factor)
    return factor.clamp(1e-8, 1e8)


def _least(layer: nn.Module, factor: Tensor, alive: Tensor, total: Tensor) -> Tensor:
    """The factors that raise no positive bias, all that a dead channel writes, above those of live channels."""
    if not isinstance(layer.bias, Tensor):
        return torch.zeros_like(factor)
    bias = layer.bias.detach().double() / total.exp()
    return (bias / (bias / factor)[alive].abs().max()).clamp(min=0).nan_to_num(0)
