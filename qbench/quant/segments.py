"""Sums over numbers that belong together."""

import torch
from torch import Tensor


def sums_by(index: Tensor, values: Tensor, count: int) -> Tensor:
    """(R, count), float64: of each row the sums of the values whose index is 0, 1, ...; in the same order every time.

    Args:
        index: (R, n) integers below `count`.
        values: (R, n).
        count: how many sums a row has.
    """
    rows = len(index)
    flat = (index + torch.arange(rows, device=index.device)[:, None] * count).flatten()
    numbers = values.double().flatten()
    if index.device.type == "cpu":
        return torch.bincount(flat, numbers, minlength=rows * count).reshape(rows, count)
    # Adding up by index has no order on a GPU.
    lengths = torch.bincount(flat, minlength=rows * count)
    ordered = numbers[flat.argsort(stable=True)]
    return torch.segment_reduce(ordered, "sum", lengths=lengths, initial=0).reshape(rows, count)
