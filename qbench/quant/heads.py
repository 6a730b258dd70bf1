"""What a detector says of its heads, and bit widths that a recipe sets for them once, for every step that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

_HEADS = "qbench_heads"
_BITS = "qbench_head_bits"


@dataclass(frozen=True)
class Heads:
    """Layers of a detector, by their names or first parts of names."""

    boxes: tuple[str, ...]
    """That place boxes, and nothing else."""
    scores: tuple[str, ...]
    """That score classes, and nothing else."""
    outputs: tuple[str, ...]
    """The last ones: those whose outputs are the network's."""


def declare(model: nn.Module, heads: Heads) -> None:
    """Say which layers are the heads of a detector; its constructor does so, so that loaded artifacts have it, too."""
    model.__dict__[_HEADS] = heads


def heads_of(model: nn.Module) -> Heads | None:
    """What was declared; None for networks without heads."""
    return model.__dict__.get(_HEADS)


def set_head_bits(model: nn.Module, bits: Mapping[str, int]) -> None:
    """Give layers bit widths that the layer policy puts above the width of all layers and that of the edges.

    Args:
        model: changed in place.
        bits: by names of layers, or first parts of names; 32 is float.
    """
    model.__dict__[_BITS] = dict(bits)


def head_bits(model: nn.Module) -> Mapping[str, int]:
    """What was set."""
    bits: Mapping[str, int] = model.__dict__.get(_BITS, {})
    return bits
