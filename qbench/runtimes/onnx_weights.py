"""Encodings as modules that compute the weight from its codes, in operations that ONNX has.

A buffer whose name ends in `_4bit` holds numbers of four bits, a byte each, because torch has no such type; the writer
of the file packs them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.encodings import Affine, Cast, Codebook, Encoding, Rotated, Scaled, Sum, VectorCodebook, from_rows
from qbench.quant.rows import rotate, to_rows
from qbench.runtimes.onnx_nodes import DequantizeLinear

FOUR_BITS = "_4bit"
_BYTES = ((torch.int8, "codes"), (torch.uint8, "codes"), (torch.int16, "codes"), (torch.int32, "codes"))
_LIMITS = {f"codes{FOUR_BITS}": {torch.int8: (-8, 7), torch.uint8: (0, 15)}}
_KINDS = ((torch.int8, f"codes{FOUR_BITS}"), (torch.uint8, f"codes{FOUR_BITS}"), *_BYTES)


def stored(encoding: Encoding, *, narrow: bool = True, transposed: bool = False) -> nn.Module:
    """A module without inputs whose output is the decoded weight.

    Args:
        encoding: of the weight.
        narrow: four-bit types may be used; else a byte is the least.
        transposed: the output is the transpose of the weight, which has two axes.

    Raises:
        Unsupported: ONNX cannot say what the encoding decodes to.
    """
    if isinstance(encoding, Affine) and (whole := _whole(encoding, narrow)) is not None:
        return _Dequantized(encoding, *whole, transposed)
    module = _stored(encoding, narrow)
    return _Transposed(module) if transposed else module


def _stored(encoding: Encoding, narrow: bool) -> nn.Module:
    match encoding:
        case Affine():
            whole = _whole(encoding, narrow)
            return _Shifted(encoding, narrow) if whole is None else _Dequantized(encoding, *whole, False)
        case Codebook():
            return _Table(encoding, narrow)
        case VectorCodebook():
            return _Vectors(encoding, narrow)
        case Cast():
            return _Narrow(encoding)
        case Sum():
            return _Sum(_stored(part, narrow) for part in encoding.parts)
        case Rotated():
            return _Rotated(encoding, narrow)
        case Scaled():
            return _Scaled(encoding, narrow)
    raise Unsupported(f"{type(encoding).__name__} weights have no ONNX form")


class _Codes(nn.Module):
    """Integers in the smallest type that holds them."""

    def __init__(self, codes: Tensor, narrow: bool) -> None:
        super().__init__()
        dtype, self._name = _smallest(narrow, codes)
        self.register_buffer(self._name, codes.to(dtype).contiguous())

    def forward(self) -> Tensor:
        codes = self._buffers[self._name]
        assert codes is not None
        return codes


def _smallest(narrow: bool, *numbers: Tensor) -> tuple[torch.dtype, str]:
    """The smallest integer type that holds all of them, and the name of a buffer for them."""
    low = min(int(n.min()) for n in numbers)
    high = max(int(n.max()) for n in numbers)
    for dtype, name in _KINDS if narrow else _BYTES:
        least, most = _LIMITS.get(name, {}).get(dtype, (torch.iinfo(dtype).min, torch.iinfo(dtype).max))
        if least <= low and high <= most:
            return dtype, name
    raise Unsupported(f"weight codes from {low} to {high} have no ONNX type")


def _whole(encoding: Affine, narrow: bool) -> tuple[Tensor, Tensor | None, torch.dtype, str] | None:
    """Codes and zero points, as DequantizeLinear takes them, and their type; None where it cannot take them.

    Zero points are subtracted from the codes where this needs no larger type.
    """
    codes = to_rows(encoding.codes, encoding.axis).long()
    if encoding.zero_point is None:
        return codes, None, *_smallest(narrow, codes)
    groups = max(encoding.scale.shape[1], encoding.zero_point.shape[1])
    zero = encoding.zero_point.expand(codes.shape[0], groups)
    if not torch.equal(zero, zero.round()):
        return None
    columns = codes.shape[1]
    size = encoding.group_size if groups > 1 and encoding.group_size else columns
    centred = codes - zero.long().repeat_interleave(size, dim=1)[:, :columns]
    less, as_it_is = _smallest(narrow, centred), _smallest(narrow, codes, zero.long())
    if _width(less) <= _width(as_it_is) or as_it_is[0] not in (torch.int8, torch.uint8):
        return centred, None, *less
    return codes, zero.long(), *as_it_is


def _width(kind: tuple[torch.dtype, str]) -> int:
    return 4 if kind[1].endswith(FOUR_BITS) else torch.iinfo(kind[0]).bits


class _Dequantized(nn.Module):
    """A uniform grid: one DequantizeLinear, per tensor, along the output channels, or in blocks of columns."""

    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self, encoding: Affine, rows: Tensor, zero: Tensor | None, dtype: torch.dtype, name: str, transposed: bool
    ) -> None:
        super().__init__()
        self.shape, self.axis, self._name = tuple(encoding.codes.shape), encoding.axis, name
        groups = max(encoding.scale.shape[1], 1 if zero is None else zero.shape[1])
        grouped, self.transposed = groups > 1, transposed
        self.block = encoding.group_size if grouped and encoding.group_size else 0
        scale = encoding.scale.expand(-1, groups)
        if grouped:
            codes, self.along = (rows.T, 0) if transposed else (rows, 1)
            scale = _full(scale, rows.shape[0], transposed)
            zero = None if zero is None else _full(zero, rows.shape[0], transposed)
        else:
            codes = from_rows(rows, self.shape, self.axis)
            codes, self.along = (codes.T, 1 - self.axis) if transposed else (codes, self.axis)
            scalar = scale.shape[0] == 1 and (zero is None or bool((zero == zero[0]).all()))
            scale = scale.reshape(()) if scalar else scale.expand(rows.shape[0], 1)[:, 0]
            zero = zero if zero is None else zero[0, 0] if scalar else zero[:, 0]
        self.register_buffer(name, codes.to(dtype).contiguous())
        self.register_buffer("scale", scale.float().contiguous())
        self.register_buffer("zero_point", None if zero is None else zero.to(dtype).contiguous())

    def forward(self) -> Tensor:
        rows: Tensor = DequantizeLinear.apply(
            self._buffers[self._name], self.scale, self.zero_point, self.along, self.block
        )
        return from_rows(rows, self.shape, self.axis) if self.block and not self.transposed else rows


def _full(parameter: Tensor, rows: int, transposed: bool) -> Tensor:
    full = parameter.expand(rows, -1)
    return full.T if transposed else full


class _Grouped(nn.Module):
    """Rows (N, d) as (N, G, size), the last group padded, so that parameters (R, G, 1) apply to groups."""

    def __init__(self, shape: tuple[int, ...], axis: int, groups: int, group_size: int | None) -> None:
        super().__init__()
        self.shape, self.axis = tuple(shape), axis
        self.columns = to_rows(torch.empty(shape, device="meta"), axis).shape[1]
        self.size = group_size if groups > 1 and group_size else self.columns
        self.groups = -(-self.columns // self.size)

    def split(self, rows: Tensor) -> Tensor:
        padded = F.pad(rows, (0, self.groups * self.size - self.columns))
        return padded.reshape(rows.shape[0], self.groups, self.size)

    def join(self, grouped: Tensor) -> Tensor:
        rows = grouped.reshape(-1, self.groups * self.size)
        rows = rows[:, : self.columns] if self.columns < self.groups * self.size else rows
        return from_rows(rows, self.shape, self.axis)


class _Shifted(_Grouped):
    """A uniform grid whose zero points are no integers."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, encoding: Affine, narrow: bool) -> None:
        assert encoding.zero_point is not None
        groups = max(encoding.scale.shape[1], encoding.zero_point.shape[1])
        super().__init__(encoding.codes.shape, encoding.axis, groups, encoding.group_size)
        self.codes = _Codes(self.split(to_rows(encoding.codes, encoding.axis)), narrow)
        self.register_buffer("scale", encoding.scale[:, :, None])
        self.register_buffer("zero_point", encoding.zero_point[:, :, None])

    def forward(self) -> Tensor:
        return self.join((self.codes().to(torch.float32) - self.zero_point) * self.scale)


class _Table(_Grouped):
    """A codebook: one table of all levels, and Gather."""

    levels: Tensor
    scale: Tensor | None
    first: Tensor | None

    def __init__(self, encoding: Codebook, narrow: bool) -> None:
        rows, groups, k = encoding.levels.shape
        most = groups if encoding.scale is None else max(groups, encoding.scale.shape[1])
        super().__init__(encoding.codes.shape, encoding.axis, most, encoding.group_size)
        self.codes = _Codes(self.split(to_rows(encoding.codes, encoding.axis)), narrow)
        self.register_buffer("levels", encoding.levels.reshape(-1))
        first = torch.arange(rows * groups, dtype=torch.int32).reshape(rows, groups, 1) * k
        self.register_buffer("first", first if rows * groups > 1 else None)
        self.register_buffer("scale", None if encoding.scale is None else encoding.scale[:, :, None])

    def forward(self) -> Tensor:
        codes = self.codes().to(torch.int32)
        values = self.levels[codes if self.first is None else codes + self.first]
        return self.join(values if self.scale is None else values * self.scale)


class _Vectors(nn.Module):
    centroids: Tensor

    def __init__(self, encoding: VectorCodebook, narrow: bool) -> None:
        super().__init__()
        self.shape, self.axis = tuple(encoding.shape), encoding.axis
        self.columns = to_rows(torch.empty(self.shape, device="meta"), self.axis).shape[1]
        self.codes = _Codes(encoding.codes, narrow)
        self.register_buffer("centroids", encoding.centroids)

    def forward(self) -> Tensor:
        rows = self.centroids[self.codes().to(torch.int32)].flatten(1)[:, : self.columns]
        return from_rows(rows, self.shape, self.axis)


class _Narrow(nn.Module):
    """A narrower float; powers of two, for which readers have no type yet, by a table of all 256."""

    def __init__(self, encoding: Cast) -> None:
        super().__init__()
        values = encoding.values
        self.powers = values.dtype == torch.float8_e8m0fnu
        self.register_buffer("values", values.view(torch.uint8) if self.powers else values)
        octets = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
        self.register_buffer("table", octets if self.powers else None)

    def forward(self) -> Tensor:
        values, table = self._buffers["values"], self._buffers["table"]
        assert values is not None
        return values.to(torch.float32) if table is None else table[values.to(torch.int32)]


class _Sum(nn.Sequential):
    def __init__(self, parts: object) -> None:
        super().__init__(*parts)  # type: ignore[misc]

    def forward(self) -> Tensor:  # type: ignore[override]
        first, *others = (part() for part in self)
        total: Tensor = first
        for part in others:
            total = total + part
        return total


class _Rotated(nn.Module):
    matrix: Tensor

    def __init__(self, encoding: Rotated, narrow: bool) -> None:
        super().__init__()
        self.shape, self.axis = tuple(encoding.decode().shape), encoding.axis
        self.inner_axis = 0 if encoding.shape else encoding.axis
        self.inner = _stored(encoding.inner, narrow)
        self.register_buffer("matrix", encoding.matrix)

    def forward(self) -> Tensor:
        return from_rows(rotate(to_rows(self.inner(), self.inner_axis), self.matrix), self.shape, self.axis)


class _Scaled(_Grouped):
    """Weights times scales that are encoded themselves."""

    def __init__(self, encoding: Scaled, narrow: bool) -> None:
        super().__init__(encoding.decode().shape, encoding.axis, encoding.grid[1], encoding.group_size)
        self.grid = encoding.grid
        self.inner, self.scale = _stored(encoding.inner, narrow), _stored(encoding.scale, narrow)

    def forward(self) -> Tensor:
        return self.join(self.split(to_rows(self.inner(), self.axis)) * self.scale().reshape(*self.grid, 1))


class _Transposed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> Tensor:
        weight: Tensor = self.inner()
        return weight.T
