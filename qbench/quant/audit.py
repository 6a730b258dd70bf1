"""Are the claimed bits true? Distinct values that share a scale are counted against the levels that were declared."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qbench.quant.encodings import Affine, Cast, Codebook, Encoding, Rotated, Scaled, Sum, VectorCodebook, to_rows
from qbench.quant.layers import encodings


def audit(model: nn.Module) -> dict[str, dict[str, int]]:
    """Of every encoding `levels`, as declared, and `used`, the most distinct values found where one scale applies.

    The parts of a sum are entries of their own, `name[0]`, `name[1]`, ...; a vector codebook counts vectors. A claim is
    false where `used` is greater.
    """
    found: dict[str, dict[str, int]] = {}
    for name, encoding in encodings(model).items():
        found |= _audit(name, encoding)
    return found


def _audit(name: str, encoding: Encoding) -> dict[str, dict[str, int]]:
    if isinstance(encoding, Sum):
        parts = [_audit(f"{name}[{i}]", part) for i, part in enumerate(encoding.parts)]
        return {key: entry for part in parts for key, entry in part.items()}
    if isinstance(encoding, Rotated):
        return _audit(name, encoding.inner)
    return {name: {"levels": _declared(encoding), "used": _used(encoding)}}


def _declared(encoding: Encoding) -> int:
    match encoding:
        case Affine():
            return encoding.levels
        case Codebook():
            return encoding.levels.shape[-1]
        case VectorCodebook():
            return encoding.centroids.shape[0]
        case Cast():
            return int(2 ** (8 * encoding.values.element_size()))
        case Scaled():
            return _declared(encoding.inner)
    raise TypeError(f"{type(encoding).__name__} is no encoding")


def _used(encoding: Encoding) -> int:
    match encoding:
        case Affine():
            return distinct(sharing(encoding.decode(), encoding.scale, encoding.axis, encoding.group_size))
        case Codebook():
            # Shared levels with many scales are distinct per scale; levels of their own, per set of levels.
            grid = encoding.levels[..., 0] if encoding.scale is None else encoding.scale
            return distinct(sharing(encoding.decode(), grid, encoding.axis, encoding.group_size))
        case VectorCodebook():
            return int(encoding.codes.unique().numel())
        case Scaled():
            grid = encoding.scale.decode().reshape(encoding.grid)
            return distinct(sharing(encoding.decode(), grid, encoding.axis, encoding.group_size))
    return distinct(encoding.decode().reshape(1, -1))


def sharing(weight: Tensor, grid: Tensor, axis: int, group_size: int | None) -> Tensor:
    """The weight as rows (S, n), one for each entry of a grid (R, G); a ragged group repeats its last value."""
    rows = to_rows(weight, axis)
    d = rows.shape[1]
    size, groups = (group_size or d), grid.shape[1]
    if groups > 1:
        last = rows[:, -1:].expand(-1, groups * size - d)
        rows = torch.cat([rows, last], dim=1).reshape(-1, groups, size)
    else:
        rows = rows[:, None]
    return rows.reshape(-1, rows.shape[2]) if grid.shape[0] > 1 else rows.transpose(0, 1).reshape(groups, -1)


def distinct(rows: Tensor) -> int:
    """The most distinct values in one row of (S, n); 0 and -0 are the same."""
    if math.prod(rows.shape) == 0:
        return 0
    ordered = rows.sort(dim=1).values
    return int((ordered[:, 1:] != ordered[:, :-1]).sum(1).max()) + 1
