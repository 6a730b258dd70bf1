"""What a layer's weight multiplies: its input as rows, and the Gram matrices of those rows, summed batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional

from qbench.errors import Unsupported

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHUNK = 1 << 25  # numbers in the rows that are held at a time
_COLUMNS = 256  # of a product that are computed at a time where the part above the diagonal is not needed


def groups_of(layer: nn.Module) -> int:
    """The groups of a convolution; 1 for a linear layer."""
    return layer.groups if isinstance(layer, CONVOLUTIONS) else 1


def grouped_weight(layer: nn.Module) -> Tensor:
    """The weight as (groups, N / groups, d): each group's neurons over each group's inputs, in the order of `rows`."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().reshape(groups_of(layer), -1, weight[0].numel())


def windows(layer: nn.Module, x: Tensor, stride: Literal["layer", "kernel"] = "layer") -> Tensor:
    """Every position that the layer's weight is applied to, as a view of the padded input.

    Args:
        layer: convolution or linear layer.
        x: its input, (B, C, *size), or (B, ..., d) for a linear layer.
        stride: `kernel` takes patches that do not overlap, whatever the layer's stride is.

    Returns:
        (B, *positions, C, *kernel), flattened per position like the weight, or (B, ..., d).

    Raises:
        Unsupported: the layer is of another kind.
    """
    if isinstance(layer, nn.Linear):
        return x
    if not isinstance(layer, CONVOLUTIONS):
        raise Unsupported(f"input patches of a {type(layer).__name__} are not defined here")
    kernel, dilation = layer.kernel_size, layer.dilation
    x = _padded(layer, x)
    steps = tuple(kernel) if stride == "kernel" else tuple(layer.stride)
    spans = [(k - 1) * dil + 1 for k, dil in zip(kernel, dilation, strict=True)]
    counts = [(n - span) // step + 1 for n, span, step in zip(x.shape[2:], spans, steps, strict=True)]
    batch, channel, *places = x.stride()
    return x.as_strided(
        (x.shape[0], *counts, x.shape[1], *kernel),
        (
            batch,
            *(s * step for s, step in zip(places, steps, strict=True)),
            channel,
            *(s * dil for s, dil in zip(places, dilation, strict=True)),
        ),
        x.storage_offset(),
    )


def _padded(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, CONVOLUTIONS)
    pads: list[int] = []
    for axis in reversed(range(x.dim() - 2)):
        span = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
        if isinstance(layer, Conv2dSame):
            size, step = x.shape[2 + axis], layer.stride[axis]
            total = max((-(-size // step) - 1) * step + span - size, 0)
        elif isinstance(layer.padding, str):
            total = span - 1 if layer.padding == "same" else 0
        else:
            total = 2 * layer.padding[axis]
        pads += [total // 2, total - total // 2]
    if not any(pads):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(x, pads, mode=mode)


def check_rows(layer: nn.Module, x: Tensor) -> None:
    """Make sure that the layer is linear in its weight as it stands: rows times weight plus bias is its output.

    Raises:
        Unsupported: it is not; the layer computes its weight, or pads its input, in a way of its own.
    """
    image = x[:1]
    with torch.no_grad():
        output = layer.forward(image)
        patches = windows(layer, image)
        lead = patches.dim() - (layer.weight.dim() - 1 if isinstance(layer, CONVOLUTIONS) else 1)
        rows = patches.flatten(0, lead - 1).reshape(math.prod(patches.shape[:lead]), groups_of(layer), -1)
        weight = grouped_weight(layer)
        product = torch.einsum("mgd,gnd->mgn", rows.to(weight), weight).flatten(1)
        if isinstance(layer.bias, Tensor):
            product = product + layer.bias
        wide = output.movedim(1, -1) if isinstance(layer, CONVOLUTIONS) else output
        wide = wide.reshape(-1, wide.shape[-1])
    if wide.shape != product.shape or (wide - product).norm() > 1e-2 * wide.norm() + 1e-6:
        raise Unsupported(f"{type(layer).__name__} does more than multiply its weight with its input patches")


@dataclass(frozen=True)
class Sampling:
    """Which positions of each image become rows.

    Attributes:
        stride: of the layer, or of the kernel: patches that do not overlap.
        rows: take about that many rows, spread evenly over images and positions; None takes all positions.
        retain: keep `int(retain * L + 1)` of the L positions of each image, drawn with replacement, as the reference
            code of GPFQ does.
        seed: of the choice, which is the same for both networks.
    """

    stride: Literal["layer", "kernel"] = "layer"
    rows: int | None = None
    retain: float | None = None
    seed: int = 0

    def choose(self, images: int, positions: int, share: float, generator: torch.Generator) -> Tensor | None:
        """(images, kept) positions; None for all. `share` is what part of all positions `rows` asks for."""
        if self.retain is not None:
            return torch.randint(positions, (images, int(self.retain * positions + 1)), generator=generator)
        if share >= 1:
            return None
        kept = max(1, math.ceil(share * positions))
        # One position from each of `kept` equal stretches, at the same place in all of them, per image.
        start = torch.rand(images, 1, generator=generator)
        return ((torch.arange(kept) + start) * (positions / kept)).long().clamp(max=positions - 1)


@dataclass
class Grams:
    """Sums over all rows, per group of the layer, in float64.

    Attributes:
        H: X~'X~, (groups, d, d).
        G: X~'X, (groups, d, d).
        F: X'X, (groups, d, d); None where errors are not to be measured.
        mean: mean row of X~, (groups, d); 0 where errors are not to be measured.
        float_mean: mean row of X, (groups, d); 0 as well.
        rows: how many.
    """

    H: Tensor
    G: Tensor
    F: Tensor | None
    mean: Tensor
    float_mean: Tensor
    rows: int


def grams(
    layer: nn.Module,
    inputs: Iterable[Tensor],
    floats: Iterable[Tensor] | None = None,
    sampling: Sampling | None = None,
    *,
    for_errors: bool = True,
) -> Grams:
    """The Gram matrices of a layer's inputs in the quantized and in the float network.

    Products are float32 (float64 for float64 inputs), sums of several float64.

    Args:
        layer: convolution or linear layer.
        inputs: X~, one tensor per batch.
        floats: X of the same batches; None when it is the same, so that H, G and F are one.
        sampling: which positions; default all.
        for_errors: whether errors are to be measured; a path can be followed without F, means, and what is above the
            diagonal of G.

    Raises:
        Unsupported: transposed convolutions, or a layer that does more than multiply its weight with its input.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    total: _Sums | None = None
    share = 1.0 if sampling.rows is None else sampling.rows / max(1, _positions(layer, inputs, sampling.stride))
    for xt, x in zip(inputs, inputs if floats is None else floats, strict=True):
        if total is None:
            check_rows(layer, xt)
            total = _Sums(layer, xt.device, same=floats is None, for_errors=for_errors)
        total.add(xt, x, sampling, share, generator)
    if total is None:
        raise ValueError("there are no inputs")
    return total.finish()


def _positions(layer: nn.Module, inputs: Iterable[Tensor], stride: Literal["layer", "kernel"]) -> int:
    shapes = getattr(inputs, "shapes", None) or [x.shape for x in inputs]
    inner = layer.weight.dim() - 1 if isinstance(layer, CONVOLUTIONS) else 1
    flat = [windows(layer, torch.empty(shape, device="meta"), stride) for shape in shapes]
    return sum(math.prod(view.shape[: view.dim() - inner]) for view in flat)


class _Sums:
    def __init__(self, layer: nn.Module, device: torch.device, same: bool, for_errors: bool) -> None:
        self.layer, self.same, self.for_errors = layer, same, for_errors
        self.groups = groups_of(layer)
        self.d = grouped_weight(layer).shape[-1]
        self.inner = layer.weight.dim() - 1 if isinstance(layer, CONVOLUTIONS) else 1
        self.sums = torch.zeros(2, self.groups, self.d, dtype=torch.float64, device=device)
        self.rows = 0

    def _begin(self, rows: Tensor) -> None:
        """Memory for sums; it is written by the first product, what is above the diagonal of G perhaps never."""
        self.H = rows.new_empty(self.groups, self.d, self.d)
        self.G = self.H if self.same else torch.empty_like(self.H)
        self.F = None if not self.for_errors else self.H if self.same else torch.empty_like(self.H)

    def _widen(self) -> None:
        """Following a path in a single product needs no float64; a sum of several does, and so do errors."""
        self.H = self.H.double()
        self.G = self.H if self.same else self.G.double()
        self.F = None if self.F is None else self.H if self.same else self.F.double()

    def add(self, xt: Tensor, x: Tensor, sampling: Sampling, share: float, generator: torch.Generator) -> None:
        views = [windows(self.layer, value, sampling.stride) for value in ((xt,) if self.same else (xt, x))]
        lead = views[0].dim() - self.inner
        images, places = views[0].shape[0], views[0].shape[1:lead]
        chosen = sampling.choose(images, math.prod(places), share, generator)
        kept = math.prod(places) if chosen is None else chosen.shape[1]
        step = max(1, _CHUNK // max(1, kept * self.groups * self.d))
        for first in range(0, images, step):
            part = None if chosen is None else chosen[first : first + step].to(xt.device)
            rows = [self._rows(view[first : first + step], part, places) for view in views]
            self._multiply(rows[0], rows[-1])

    def _rows(self, view: Tensor, chosen: Tensor | None, places: tuple[int, ...]) -> Tensor:
        """(rows, groups, d)"""
        if chosen is not None and places:
            image = torch.arange(view.shape[0], device=view.device)[:, None]
            view = view[(image, *torch.unravel_index(chosen, places))]
        # Contiguous: matrix products of rows in another order of memory are many times slower.
        rows = view.contiguous().view(-1, self.groups, self.d)
        return rows if rows.dtype == torch.float64 else rows.float()

    def _multiply(self, xt: Tensor, x: Tensor) -> None:
        if self.rows == 0:
            self._begin(xt)
        elif self.H.dtype != torch.float64:
            self._widen()
        begun, self.rows = self.rows > 0, self.rows + len(xt)
        if self.for_errors:
            ones = xt.new_ones(len(xt))
            for total, rows in zip(self.sums, (xt, x), strict=True):
                total += (ones @ rows.flatten(1)).view_as(total)
        xt, x = xt.movedim(1, 0), x.movedim(1, 0)
        _add_lower(self.H, xt, xt, first_time=not begun)
        if not self.same:
            if self.F is None:
                _add_lower(self.G, xt, x, first_time=not begun)
            else:
                if begun:
                    self.G += xt.mT @ x
                else:
                    self.G.copy_(xt.mT @ x)
                _add_lower(self.F, x, x, first_time=not begun)

    def finish(self) -> Grams:
        if self.for_errors and self.H.dtype != torch.float64:
            self._widen()  # differences of large numbers are to come
        for square in (self.H, None if self.same else self.F):
            if square is not None:
                _mirror(square)
        mean, float_mean = self.sums / self.rows
        return Grams(self.H, self.G, self.F, mean, float_mean, self.rows)


def _mirror(square: Tensor) -> None:
    """Copy what is below the blocks on the diagonal to above them."""
    for first in range(0, square.shape[-1], _COLUMNS):
        last = first + _COLUMNS
        square[:, first:last, last:] = square[:, last:, first:last].mT


def _add_lower(square: Tensor, left: Tensor, right: Tensor, *, first_time: bool) -> None:
    """Add left'right on and below the diagonal (and in the blocks on it); the first time, put it there."""
    for first in range(0, left.shape[-1], _COLUMNS):
        last = min(first + _COLUMNS, left.shape[-1])
        product = left[..., first:last].mT @ right[..., :last]
        if first_time:
            square[:, first:last, :last] = product
        else:
            square[:, first:last, :last] += product
