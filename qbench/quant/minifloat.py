"""Floats of 4, 6 and 8 bits: their values, rounding to them, and blocks of them that share a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qbench.quant.encodings import Cast, Codebook, Encoding, Scaled, expand_groups, from_rows, to_rows

FormatName = Literal["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1"]


@dataclass(frozen=True)
class FloatFormat:
    """A sign, an exponent and a mantissa, with subnormal numbers, without infinities.

    As the OCP specifications of 8-bit floats (v1.0) and of microscaling formats (MX, v1.0) define them.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float
    """The largest finite number; e4m3 and e5m2 give up what would be larger for NaN and infinity."""
    dtype: torch.dtype | None = None
    """What torch calls it."""

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def least_exponent(self) -> int:
        """Of normal numbers; subnormal ones share it."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def greatest_exponent(self) -> int:
        return math.floor(math.log2(self.largest))

    def round(self, x: Tensor) -> Tensor:
        """The nearest number of the format (float32, any shape), ties to even, beyond the largest number that one."""
        exact = x.double()
        exponent = (torch.frexp(exact).exponent - 1).clamp(min=self.least_exponent)
        step = torch.exp2((exponent - self.mantissa_bits).double())
        return ((exact / step).round() * step).clamp(-self.largest, self.largest).float()

    def levels(self) -> Tensor:
        """All different numbers of the format, ascending (float32): one zero."""
        steps = 2**self.mantissa_bits
        fractions = torch.arange(steps, dtype=torch.float64) / steps
        exponents = range(self.least_exponent, self.greatest_exponent + 1)
        normal = torch.cat([(1 + fractions) * 2.0**e for e in exponents])
        sizes = torch.cat([fractions * 2.0**self.least_exponent, normal[normal <= self.largest]]).float()
        return torch.cat([-sizes.flip(0)[:-1], sizes])

    def store(self, values: Tensor, axis: int = 0, scale: Tensor | None = None, size: int | None = None) -> Encoding:
        """Numbers of the format, of any shape, at their true width: codes into the levels, or a cast of 8 bits.

        Args:
            values: of the format.
            axis: output-channel axis.
            scale: (R, G), float32, of the values.
            size: columns that share a scale.
        """
        if self.dtype is None:
            levels = self.levels().to(values.device)
            codes = torch.searchsorted(levels, values.contiguous()).to(torch.int32)
            return Codebook(codes, levels.reshape(1, 1, -1), axis, size, scale)
        narrow = Cast(values.to(self.dtype))
        if scale is None:
            return narrow
        return Scaled(narrow, Cast(scale), (scale.shape[0], scale.shape[1]), axis, size)


FORMATS: dict[FormatName, FloatFormat] = {
    "fp8_e4m3": FloatFormat(4, 3, 448.0, torch.float8_e4m3fn),
    "fp8_e5m2": FloatFormat(5, 2, 57344.0, torch.float8_e5m2),
    "fp6_e3m2": FloatFormat(3, 2, 28.0),
    "fp6_e2m3": FloatFormat(2, 3, 7.5),
    "fp4_e2m1": FloatFormat(2, 1, 6.0),
}
USUAL: dict[int, FormatName] = {8: "fp8_e4m3", 6: "fp6_e2m3", 4: "fp4_e2m1"}
"""The format of each width whose weights are the more exact."""


def rounded(weight: Tensor, form: FloatFormat, scale: Tensor, axis: int = 0, size: int | None = None) -> Tensor:
    """The numbers of the format nearest to the weight divided by its scales (R, G); a scale of 0 is taken as 1."""
    rows = to_rows(weight, axis)
    step = expand_groups(torch.where(scale > 0, scale, 1).double(), rows.shape[1], size)
    return from_rows(form.round(rows / step), weight.shape, axis)


def blocked(weight: Tensor, size: int, axis: int = 0) -> Tensor:
    """(N, G, size): consecutive columns of each row; the last block of a row may end in zeros that are no weights."""
    rows = to_rows(weight, axis)
    blocks = -(-rows.shape[1] // size)
    return torch.nn.functional.pad(rows, (0, blocks * size - rows.shape[1])).reshape(len(rows), blocks, size)


def microscaled(weight: Tensor, form: FloatFormat, axis: int = 0, size: int = 32) -> Scaled:
    """Blocks that share a power of two in 8 bits: the MX formats (OCP, v1.0, section 6.3).

    The shared exponent is that of the block's largest magnitude, less the format's greatest, from -127 to 127; a
    block of zeros has the scale 1. Elements beyond the format's largest number become that one.

    Args:
        weight: any shape, finite.
        form: of the elements.
        axis: output-channel axis; blocks lie along the others.
        size: of a block.
    """
    largest = blocked(weight.double(), size, axis).abs().amax(2)
    exponent = torch.frexp(largest).exponent - 1 - form.greatest_exponent
    shared = torch.exp2(torch.where(largest > 0, exponent.clamp(-127, 127), 0).double()).float()
    values = rounded(weight, form, shared, axis, size)
    inner = form.store(values, axis)
    return Scaled(inner, Cast(shared.to(torch.float8_e8m0fnu)), (shared.shape[0], shared.shape[1]), axis, size)


def nvfp4(weight: Tensor, axis: int = 0, size: int = 16) -> Scaled:
    """Blocks of fp4 with a scale in fp8 (e4m3), times one float32 for the tensor: NVFP4.

    The tensor's scale makes the largest block scale 448; a block's makes its largest magnitude 6, before rounding.

    Args:
        weight: any shape, finite.
        axis: output-channel axis; blocks lie along the others.
        size: of a block.
    """
    element, fine = FORMATS["fp4_e2m1"], FORMATS["fp8_e4m3"]
    largest = blocked(weight.float(), size, axis).abs().amax(2)
    whole = (largest.amax() / (element.largest * fine.largest)).reshape(1, 1)
    whole = torch.where(whole > 0, whole, 1)
    blocks = fine.round(largest.double() / element.largest / whole.double())
    values = rounded(weight, element, blocks.double() * whole.double(), axis, size)
    inner = element.store(values, axis, whole)
    return Scaled(inner, Cast(blocks.to(torch.float8_e4m3fn)), (blocks.shape[0], blocks.shape[1]), axis, size)
