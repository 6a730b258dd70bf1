"""Encodings of one code per weight: on a uniform grid, and by a codebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbench.quant import coding
from qbench.quant.rows import as_grid, code_range, expand_groups, from_rows, to_rows


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
    coder: coding.Coder | None = None
    """How the codes are stored; None is at their true bit width."""

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
        codes = coding.encode(self.codes - self.low, self.levels, self.coder)
        packed = {"codes": codes, "scale": self.scale}
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
            "coder": self.coder,
        }

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Affine:
        low, high, coder = meta["low"], meta["high"], meta.get("coder")
        codes = coding.decode(tensors["codes"], high - low + 1, meta["shape"], coder) + low
        zero = tensors.get("zero_point")
        return Affine(codes, tensors["scale"], low, high, zero, meta["axis"], meta["group_size"], coder)


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
    coder: coding.Coder | None = None
    """How the codes are stored; None is at their true bit width."""

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
        packed = {"codes": coding.encode(self.codes, self.levels.shape[-1], self.coder), "levels": self.levels}
        return packed if self.scale is None else packed | {"scale": self.scale}

    def meta(self) -> dict[str, Any]:
        return {
            "type": "codebook",
            "shape": list(self.codes.shape),
            "axis": self.axis,
            "group_size": self.group_size,
            "coder": self.coder,
        }

    @staticmethod
    def restore(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codebook:
        levels, coder = tensors["levels"], meta.get("coder")
        codes = coding.decode(tensors["codes"], levels.shape[-1], meta["shape"], coder)
        return Codebook(codes, levels, meta["axis"], meta["group_size"], tensors.get("scale"), coder)
