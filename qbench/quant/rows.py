"""A weight as rows, and the parameters that its rows and groups of columns share."""

from typing import Literal

import torch
from torch import Tensor


def to_rows(tensor: Tensor, axis: int = 0) -> Tensor:
    """(N, d): one row per index of `axis`."""
    return tensor.movedim(axis, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]


def from_rows(rows: Tensor, shape: torch.Size | tuple[int, ...], axis: int = 0) -> Tensor:
    """The inverse of `to_rows`."""
    if len(shape) == 1:
        return rows[:, 0]
    moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
    return rows.reshape(moved).movedim(0, axis).contiguous()


def expand_groups(parameter: Tensor, columns: int, group_size: int | None) -> Tensor:
    """Parameters (R, G) spread over the columns: (R, 1) with one group, which is every column's, else (R, columns)."""
    if group_size is None or parameter.shape[1] == 1:
        return parameter
    return parameter.repeat_interleave(group_size, dim=1)[:, :columns]


def as_grid(parameter: Tensor | float, like: Tensor) -> Tensor:
    """A scalar, (R,) or (R, G) parameter as (R, G) of `like`'s device, float32 unless it has a float dtype already."""
    value = torch.as_tensor(parameter, device=like.device)
    if not value.is_floating_point():
        value = value.float()
    return value.reshape(-1, 1) if value.dim() < 2 else value


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """[-(2**(b-1) - 1), 2**(b-1) - 1] if symmetric (one bit: [-1, 0]), else [0, 2**b - 1]."""
    if not symmetric:
        return 0, 2**bits - 1
    top = 2 ** (bits - 1) - 1
    return (-top, top) if top else (-1, 0)


def rotate(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix.T` for one matrix (d, p); for several, (B, d / B, p), each makes its share of the d columns.

    Args:
        rows: (N, p), or (N, B p).
        matrix: see above.

    Returns:
        (N, d).
    """
    matrices = matrix if matrix.dim() == 3 else matrix[None]
    # In operations that ONNX knows.
    parts = rows.reshape(len(rows), len(matrices), -1).transpose(0, 1) @ matrices.transpose(1, 2)
    return parts.transpose(0, 1).flatten(1)


def sharing_rows(weight: Tensor, granularity: Literal["tensor", "channel"], axis: int = 0) -> Tensor:
    """(R, n): a row for what shares a scale, the tensor or an output channel."""
    rows = to_rows(weight, axis)
    return rows.reshape(1, -1) if granularity == "tensor" else rows


def spread(parameter: Tensor, dims: int, axis: int = 0) -> Tensor:
    """A parameter (R,) of such rows in a shape that broadcasts to the weight, which has `dims` axes."""
    shape = [1] * dims
    shape[axis] = len(parameter)
    return parameter.reshape(shape)
