"""Encodings: integer codes plus how to decode them, a small closed algebra that covers every method.

Layout shared by all: a weight of any shape is seen as rows (N, d), one row per output channel, by moving `axis` to the
front and flattening the rest. Parameters of a grid have shape (R, G): R is 1 or N, and G is the number of groups of
`group_size` consecutive columns in a row (the last may be ragged); G is 1 without groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from qbench.quant import coding
from qbench.quant.rows import as_grid, code_range, expand_groups, from_rows, rotate, to_rows
from qbench.quant.scalar import Affine, Codebook

__all__ = [
    "Affine",
    "Cast",
    "Codebook",
    "Encoding",
    "Rotated",
    "Scaled",
    "Sum",
    "VectorCodebook",
    "as_grid",
    "code_range",
    "coded",
    "expand_groups",
    "from_rows",
    "leaves",
    "move",
    "restore",
    "to_rows",
]


@runtime_checkable
class Encoding(Protocol):
    """What every encoding can do. `nominal_bits` is the size of all codes by the textbook, without any overhead."""

    @property
    def nominal_bits(self) -> float: ...
    def decode(self) -> Tensor: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def meta(self) -> dict[str, Any]: ...


@dataclass(frozen=True, eq=False)
class VectorCodebook:
    """Concatenated centroids: a row is cut into vectors of g columns (the last padded), each replaced by a centroid."""

    codes: Tensor
    """(N, ceil(d / g)) integers in [0, K)."""
    centroids: Tensor
    """(K, g), float32."""
    shape: tuple[int, ...]
    axis: int = 0
    coder: coding.Coder | None = None
    """How the codes are stored; None is at their true bit width."""

    @property
    def nominal_bits(self) -> float:
        return self.codes.numel() * math.log2(self.centroids.shape[0])

    def decode(self) -> Tensor:
        columns = math.prod(self.shape) // self.shape[self.axis]
        rows = self.centroids[self.codes.long()].flatten(1)[:, :columns]
        return from_rows(rows, self.shape, self.axis)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "codes": coding.encode(self.codes, self.centroids.shape[0], self.coder),
            "centroids": self.centroids,
        }

    def meta(self) -> dict[str, Any]:
        codes = list(self.codes.shape)
        return {"type": "vector", "shape": list(self.shape), "codes": codes, "axis": self.axis, "coder": self.coder}

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VectorCodebook:
        centroids, coder = tensors["centroids"], meta.get("coder")
        codes = coding.decode(tensors["codes"], centroids.shape[0], meta["codes"], coder)
        return VectorCodebook(codes, centroids, tuple(meta["shape"]), meta["axis"], coder)


@dataclass(frozen=True, eq=False)
class Cast:
    """A narrower float: `values` in float16, bfloat16, float8_e4m3fn or float8_e5m2.

    As the scale of `Scaled` also float8_e8m0fnu, which holds powers of two, and float32.
    """

    values: Tensor

    @property
    def nominal_bits(self) -> float:
        return self.values.numel() * self.values.element_size() * 8

    def decode(self) -> Tensor:
        return self.values.to(torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        # The file format has no name for powers of two that all its readers know.
        octets = self.values.dtype == torch.float8_e8m0fnu
        return {"values": self.values.view(torch.uint8) if octets else self.values}

    def meta(self) -> dict[str, Any]:
        powers = self.values.dtype == torch.float8_e8m0fnu
        return {"type": "cast", "shape": list(self.values.shape)} | ({"powers": True} if powers else {})

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Cast:
        values = tensors["values"].reshape(meta["shape"])
        return Cast(values.view(torch.float8_e8m0fnu) if meta.get("powers") else values)


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
    """`inner @ matrix.T` on the rows: weights that were quantized in another basis, or in a part of one."""

    inner: Encoding
    matrix: Tensor
    """(d, d), float32. With a `shape` also (d, p), or (B, d / B, p): each makes its share of the d columns of a row."""
    axis: int = 0
    shape: tuple[int, ...] | None = None
    """Of the weight, where the inner encoding is that of a matrix (N, p) or (N, B p); None means that of the inner."""

    @property
    def nominal_bits(self) -> float:
        return self.inner.nominal_bits

    def decode(self) -> Tensor:
        inner = self.inner.decode()
        rows = to_rows(inner, self.axis if self.shape is None else 0)
        return from_rows(rotate(rows, self.matrix), self.shape or inner.shape, self.axis)

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix} | {f"inner.{key}": value for key, value in self.inner.tensors().items()}

    def meta(self) -> dict[str, Any]:
        own = {} if self.shape is None else {"shape": list(self.shape)}
        return {"type": "rotated", "inner": self.inner.meta(), "axis": self.axis} | own

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rotated:
        shape = tuple(meta["shape"]) if "shape" in meta else None
        return Rotated(restore(meta["inner"], _under(tensors, "inner")), tensors["matrix"], meta["axis"], shape)


@dataclass(frozen=True, eq=False)
class Scaled:
    """`inner * scale`, where the scale is itself encoded: in 8 bits, as a narrow float, or on two levels."""

    inner: Encoding
    scale: Encoding
    """Decodes to the R x G scales, row by row, in any shape."""
    grid: tuple[int, int]
    """(R, G)."""
    axis: int = 0
    group_size: int | None = None

    @property
    def nominal_bits(self) -> float:
        return self.inner.nominal_bits

    def decode(self) -> Tensor:
        inner = self.inner.decode()
        rows = to_rows(inner, self.axis)
        scale = expand_groups(self.scale.decode().reshape(self.grid), rows.shape[1], self.group_size)
        return from_rows(rows * scale, inner.shape, self.axis)

    def tensors(self) -> dict[str, Tensor]:
        inner = {f"inner.{key}": value for key, value in self.inner.tensors().items()}
        return inner | {f"scale.{key}": value for key, value in self.scale.tensors().items()}

    def meta(self) -> dict[str, Any]:
        return {
            "type": "scaled",
            "inner": self.inner.meta(),
            "scale": self.scale.meta(),
            "grid": list(self.grid),
            "axis": self.axis,
            "group_size": self.group_size,
        }

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scaled:
        inner, scale = (restore(meta[key], _under(tensors, key)) for key in ("inner", "scale"))
        rows, groups = meta["grid"]
        return Scaled(inner, scale, (rows, groups), meta["axis"], meta["group_size"])


_TYPES: dict[str, Any] = {
    "affine": Affine,
    "codebook": Codebook,
    "vector": VectorCodebook,
    "cast": Cast,
    "sum": Sum,
    "rotated": Rotated,
    "scaled": Scaled,
}


def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoding:
    """The encoding that `meta()` and `tensors()` describe."""
    encoding: Encoding = _TYPES[meta["type"]].restore(meta, tensors)
    return encoding


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}


def leaves(encoding: Encoding) -> Iterator[Encoding]:
    """The encodings that hold the weights' codes or values: the parts of a sum, and what is rotated or scaled."""
    if isinstance(encoding, Sum):
        for part in encoding.parts:
            yield from leaves(part)
    elif isinstance(encoding, Rotated | Scaled):
        yield from leaves(encoding.inner)
    else:
        yield encoding


def coded(encoding: Encoding, coder: coding.Coder | None) -> Encoding:
    """The same encoding with all codes stored by that coder; floats stay as they are."""
    match encoding:
        case Affine() | Codebook() | VectorCodebook():
            return replace(encoding, coder=coder)
        case Sum():
            return Sum(tuple(coded(part, coder) for part in encoding.parts))
        case Rotated() | Scaled():
            return replace(encoding, inner=coded(encoding.inner, coder))
    return encoding


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
