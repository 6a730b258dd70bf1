"""Encodings: integer codes plus how to decode them, a small closed algebra that covers every method.

Layout shared by all: a weight of any shape is seen as rows (N, d), one row per output channel, by moving `axis` to the
front and flattening the rest. Parameters of a grid have shape (R, G): R is 1 or N, and G is the number of groups of
`group_size` consecutive columns in a row (the last may be ragged); G is 1 without groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from qbench.quant import bits as bitpack


@runtime_checkable
class Encoding(Protocol):
    """What every encoding can do. `nominal_bits` is the size of all codes by the textbook, without any overhead."""

    @property
    def nominal_bits(self) -> float: ...
    def decode(self) -> Tensor: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def meta(self) -> dict[str, Any]: ...


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


@dataclass(frozen=True, eq=False)
class Affine:
    """`(codes - zero_point) * scale`, codes in [low, high], per tensor, channel or group."""

    codes: Tensor
    """Integers of the weight's shape."""
    scale: Tensor
    """(R, G), float32."""
    low: int
    high: int
    zero_point: Tensor | None = None
    """(R, G), float32 (HQQ's is not an integer); None means 0."""
    axis: int = 0
    group_size: int | None = None

    @staticmethod
    def nearest(
        weight: Tensor,
        scale: Tensor | float,
        *,
        bits: int | None = None,
        low: int | None = None,
        high: int | None = None,
        zero_point: Tensor | float | None = None,
        axis: int = 0,
        group_size: int | None = None,
    ) -> Affine:
        """Round each weight to the nearest code, ties to even.

        Args:
            weight: any shape.
            scale: scalar, (N,) or (R, G); zeros (dead channels) are taken as 1.
            bits: sets [low, high]: narrow and symmetric without a zero point, else [0, 2**bits - 1].
            low: lowest code, when not set by `bits`.
            high: highest code, when not set by `bits`.
            zero_point: code that decodes to 0; None for symmetric grids.
            axis: output-channel axis of the weight.
            group_size: columns per group.
        """
        if low is None or high is None:
            if bits is None:
                raise ValueError("give bits, or low and high")
            low, high = code_range(bits, symmetric=zero_point is None)
        rows = to_rows(weight.detach(), axis)
        step = as_grid(scale, rows)
        step = torch.where(step > 0, step, torch.ones_like(step)).float()
        zero = None if zero_point is None else as_grid(zero_point, rows).float()
        codes = rows / expand_groups(step, rows.shape[1], group_size)
        if zero is None:
            codes = codes.round()
        else:
            # Only the fraction before rounding: next to a large zero point float32 has no room for the weight's digits.
            offset = expand_groups(zero, rows.shape[1], group_size)
            codes = (codes + (offset - offset.round())).round() + offset.round()
        codes = codes.clamp(low, high).to(torch.int32)
        return Affine(from_rows(codes, weight.shape, axis), step, low, high, zero, axis, group_size)

    @property
    def levels(self) -> int:
        return self.high - self.low + 1

    @property
    def nominal_bits(self) -> float:
        return self.codes.numel() * math.log2(self.levels)

    def decode(self) -> Tensor:
        rows = to_rows(self.codes, self.axis).to(torch.float32)
        if self.zero_point is not None:
            rows = rows - expand_groups(self.zero_point, rows.shape[1], self.group_size)
        return from_rows(rows * expand_groups(self.scale, rows.shape[1], self.group_size), self.codes.shape, self.axis)

    def tensors(self) -> dict[str, Tensor]:
        packed = {"codes": bitpack.pack(self.codes - self.low, bitpack.width_of(self.levels)), "scale": self.scale}
        return packed if self.zero_point is None else packed | {"zero_point": self.zero_point}

    def meta(self) -> dict[str, Any]:
        shape = list(self.codes.shape)
        return {
            "type": "affine",
            "shape": shape,
            "low": self.low,
            "high": self.high,
            "axis": self.axis,
            "group_size": self.group_size,
        }

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Affine:
        low, high, shape = meta["low"], meta["high"], meta["shape"]
        flat = bitpack.unpack(tensors["codes"], bitpack.width_of(high - low + 1), math.prod(shape))
        codes = flat.reshape(shape) + low
        return Affine(codes, tensors["scale"], low, high, tensors.get("zero_point"), meta["axis"], meta["group_size"])


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """[-(2**(b-1) - 1), 2**(b-1) - 1] if symmetric (one bit: [-1, 0]), else [0, 2**b - 1]."""
    if not symmetric:
        return 0, 2**bits - 1
    top = 2 ** (bits - 1) - 1
    return (-top, top) if top else (-1, 0)


@dataclass(frozen=True, eq=False)
class Codebook:
    """`levels[codes]`, levels per tensor, channel or group; with a scale, `levels[codes] * scale`."""

    codes: Tensor
    """Integers of the weight's shape in [0, K)."""
    levels: Tensor
    """(R, G, K), float32."""
    axis: int = 0
    group_size: int | None = None
    scale: Tensor | None = None
    """(R, G), float32; None means 1."""

    @staticmethod
    def nearest(
        weight: Tensor,
        levels: Tensor,
        *,
        scale: Tensor | float | None = None,
        axis: int = 0,
        group_size: int | None = None,
    ) -> Codebook:
        """Assign each weight to its nearest level.

        Args:
            weight: any shape.
            levels: (K,), (N, K) or (R, G, K); they are sorted here. Without groups, or shared by all of them.
            scale: of the levels: scalar, (N,) or (R, G); zeros (dead channels) are taken as 1.
            axis: output-channel axis of the weight.
            group_size: columns per group.
        """
        rows = to_rows(weight.detach(), axis).float()
        shaped = levels.reshape(1, 1, -1) if levels.dim() == 1 else levels[:, None] if levels.dim() == 2 else levels
        ordered = shaped.to(rows.device, torch.float32).sort(dim=-1).values.contiguous()
        middles = (ordered[..., 1:] + ordered[..., :-1]) / 2
        n, d = rows.shape
        step = None
        if scale is not None:
            step = as_grid(scale, rows).float()
            step = torch.where(step > 0, step, torch.ones_like(step))
            rows = rows / expand_groups(step, d, group_size)
        size = group_size or d
        groups = -(-d // size)
        padded = torch.nn.functional.pad(rows, (0, groups * size - d)).reshape(n, groups, size)
        shared = middles.shape[:2] == (1, 1)
        table = middles[0, 0] if shared else middles.expand(n, groups, -1).contiguous()
        codes = torch.searchsorted(table, padded.contiguous())
        flat = codes.reshape(n, groups * size)[:, :d].to(torch.int32)
        return Codebook(from_rows(flat, weight.shape, axis), ordered, axis, group_size, step)

    @property
    def nominal_bits(self) -> float:
        return self.codes.numel() * math.log2(self.levels.shape[-1])

    def decode(self) -> Tensor:
        codes = to_rows(self.codes, self.axis).long()
        n, d = codes.shape
        rows, groups, k = self.levels.shape
        row = torch.arange(n, device=codes.device)[:, None] if rows > 1 else 0
        # One group may be shared by all columns although the scale has more.
        size = self.group_size if self.group_size and groups > 1 else d
        group = torch.arange(d, device=codes.device)[None, :] // max(size, 1)
        flat = self.levels.reshape(-1)[(row * groups + group) * k + codes]
        if self.scale is not None:
            flat = flat * expand_groups(self.scale, d, self.group_size)
        return from_rows(flat, self.codes.shape, self.axis)

    def tensors(self) -> dict[str, Tensor]:
        packed = {"codes": bitpack.pack(self.codes, bitpack.width_of(self.levels.shape[-1])), "levels": self.levels}
        return packed if self.scale is None else packed | {"scale": self.scale}

    def meta(self) -> dict[str, Any]:
        return {
            "type": "codebook",
            "shape": list(self.codes.shape),
            "axis": self.axis,
            "group_size": self.group_size,
        }

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codebook:
        levels = tensors["levels"]
        flat = bitpack.unpack(tensors["codes"], bitpack.width_of(levels.shape[-1]), math.prod(meta["shape"]))
        codes = flat.reshape(meta["shape"])
        return Codebook(codes, levels, meta["axis"], meta["group_size"], tensors.get("scale"))


@dataclass(frozen=True, eq=False)
class VectorCodebook:
    """Concatenated centroids: a row is cut into vectors of g columns (the last padded), each replaced by a centroid."""

    codes: Tensor
    """(N, ceil(d / g)) integers in [0, K)."""
    centroids: Tensor
    """(K, g), float32."""
    shape: tuple[int, ...]
    axis: int = 0

    @property
    def nominal_bits(self) -> float:
        return self.codes.numel() * math.log2(self.centroids.shape[0])

    def decode(self) -> Tensor:
        columns = math.prod(self.shape) // self.shape[self.axis]
        rows = self.centroids[self.codes.long()].flatten(1)[:, :columns]
        return from_rows(rows, self.shape, self.axis)

    def tensors(self) -> dict[str, Tensor]:
        width = bitpack.width_of(self.centroids.shape[0])
        return {"codes": bitpack.pack(self.codes, width), "centroids": self.centroids}

    def meta(self) -> dict[str, Any]:
        codes = list(self.codes.shape)
        return {"type": "vector", "shape": list(self.shape), "codes": codes, "axis": self.axis}

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VectorCodebook:
        centroids = tensors["centroids"]
        flat = bitpack.unpack(tensors["codes"], bitpack.width_of(centroids.shape[0]), math.prod(meta["codes"]))
        return VectorCodebook(flat.reshape(meta["codes"]), centroids, tuple(meta["shape"]), meta["axis"])


@dataclass(frozen=True, eq=False)
class Cast:
    """A narrower float: `values` in float16, bfloat16, float8_e4m3fn or float8_e5m2."""

    values: Tensor

    @property
    def nominal_bits(self) -> float:
        return self.values.numel() * self.values.element_size() * 8

    def decode(self) -> Tensor:
        return self.values.to(torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def meta(self) -> dict[str, Any]:
        return {"type": "cast", "shape": list(self.values.shape)}

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Cast:
        return Cast(tensors["values"].reshape(meta["shape"]))


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of several encodings: coarse and fine parts, additive binary bases."""

    parts: tuple[Encoding, ...]

    @property
    def nominal_bits(self) -> float:
        return sum(part.nominal_bits for part in self.parts)

    def decode(self) -> Tensor:
        total = self.parts[0].decode()
        for part in self.parts[1:]:
            total = total + part.decode()
        return total

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{key}": value for i, part in enumerate(self.parts) for key, value in part.tensors().items()}

    def meta(self) -> dict[str, Any]:
        return {"type": "sum", "parts": [part.meta() for part in self.parts]}

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sum:
        return Sum(tuple(restore(part, _under(tensors, str(i))) for i, part in enumerate(meta["parts"])))


@dataclass(frozen=True, eq=False)
class Rotated:
    """`inner @ matrix.T` on the rows: weights that were quantized in another basis."""

    inner: Encoding
    matrix: Tensor
    """(d, d), float32."""
    axis: int = 0

    @property
    def nominal_bits(self) -> float:
        return self.inner.nominal_bits

    def decode(self) -> Tensor:
        inner = self.inner.decode()
        return from_rows(to_rows(inner, self.axis) @ self.matrix.T, inner.shape, self.axis)

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix} | {f"inner.{key}": value for key, value in self.inner.tensors().items()}

    def meta(self) -> dict[str, Any]:
        return {"type": "rotated", "inner": self.inner.meta(), "axis": self.axis}

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rotated:
        return Rotated(restore(meta["inner"], _under(tensors, "inner")), tensors["matrix"], meta["axis"])


_TYPES: dict[str, Any] = {
    "affine": Affine,
    "codebook": Codebook,
    "vector": VectorCodebook,
    "cast": Cast,
    "sum": Sum,
    "rotated": Rotated,
}


def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoding:
    """The encoding that `meta()` and `tensors()` describe."""
    encoding: Encoding = _TYPES[meta["type"]].restore(meta, tensors)
    return encoding


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}


def move(encoding: Encoding, device: torch.device | str) -> Encoding:
    """The same encoding with its tensors on `device`."""
    values = {field.name: _move(getattr(encoding, field.name), device) for field in fields(encoding)}  # type: ignore
    moved: Encoding = type(encoding)(**values)
    return moved


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and value and isinstance(value[0], Encoding):
        return tuple(move(part, device) for part in value)
    return move(value, device) if isinstance(value, Encoding) else value
