"""The greatest difference of a network and a quantized form of it, by a mixed-integer program (QEBVerif)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qbench.verify.differences import Stage
from qbench.verify.fixed_point import PIXELS, FixedPoint, Layer
from qbench.verify.program import Program

_SLACK = 1e-7  # what float64 may have rounded of an interval
_TIE = 1e-6  # of a step: what is so near to halfway may become either code


@dataclass(frozen=True)
class Grid:
    """Where numbers are rounded to: `step` times whole codes, clipped to [low, high]."""

    step: float
    low: int
    high: int
    spacing: float = 0.0
    """All numbers are multiples of this part of a step, a power of two; 0 where that is not known: a number halfway
    between two codes may then become either."""

    def around(self, low: float, high: float) -> tuple[int, int]:
        """The least and the greatest code that numbers from low to high may become, before they are clipped."""
        return math.ceil(low / self.step - 0.5 - _TIE), math.floor(high / self.step + 0.5 + _TIE)


@dataclass(frozen=True)
class Scaled:
    """What a network is called with for pixels p: `p * scale + offset` (d,), perhaps rounded."""

    scale: Tensor
    offset: Tensor
    grid: Grid | None = None


@dataclass(frozen=True)
class Twins:
    """Both networks, layer by layer, with ReLU between the layers."""

    layers: Sequence[Layer]
    rounded: Sequence[Layer]
    grids: Sequence[Grid | None]
    """Behind each ReLU of the quantized network."""
    inputs: tuple[Scaled, Scaled]
    """Of the float network, never rounded, and of the quantized one."""


def fixed_point(layers: Sequence[Layer], form: FixedPoint) -> Twins:
    """A network and its fixed-point form."""
    one, size = 2.0**form.fraction, layers[0].weight.shape[1]
    spacings = [one / (PIXELS + 1), *[1.0] * (len(layers) - 2)]
    grids = [Grid(1 / one, 0, 2**form.bits - 1, spacing / 2 ** (form.bits - 1)) for spacing in spacings]
    zero = torch.zeros(size, dtype=torch.float64)
    inputs = Scaled(zero + 1 / PIXELS, zero), Scaled(zero + 1 / (PIXELS + 1), zero)
    return Twins(layers, form.quantize(layers), grids[: len(layers) - 1], inputs)


class Exact:
    """Both networks as one program: pixels and codes are whole numbers, ReLU and clamps binary ones.

    The intervals of the differences behind the hidden layers are constraints as well: they change no solution, but are
    what makes it fast.
    """

    def __init__(self, twins: Twins, low: Tensor, high: Tensor, stages: Sequence[Stage]) -> None:
        """
        Args:
            twins: the networks.
            low: least value of each pixel (d,), whole numbers.
            high: greatest value.
            stages: what is known behind each layer.
        """
        self.program = program = Program()
        self.twins = twins
        self.pixels = [program.variable(*ends, integer=True) for ends in zip(low.tolist(), high.tolist(), strict=True)]
        # What a float activation and a quantized one are the columns of, with what these stand for: scale and offset.
        self.floats, self.codes = self.pixels, self.pixels
        self.decode = [(scaled.scale.numpy(), scaled.offset.numpy()) for scaled in twins.inputs]
        self._round_inputs(low, high)
        hidden = zip(twins.layers[:-1], twins.rounded[:-1], twins.grids, stages[:-1], strict=True)
        for layer, own, grid, stage in hidden:
            self._hidden(layer, own, grid, stage)

    def _round_inputs(self, low: Tensor, high: Tensor) -> None:
        grid, (scale, offset) = self.twins.inputs[1].grid, self.decode[1]
        if grid is None:
            return
        codes = []
        for pixel, factor, term, *ends in zip(self.pixels, scale, offset, low.tolist(), high.tolist(), strict=True):
            first, last = (end * factor + term for end in ends)
            reach = grid.around(first, last)
            places = float(reach[0] - grid.low), float(reach[1] - grid.low)
            ratio, shift = factor / grid.step, term / grid.step - grid.low
            code = self.program.rounded([pixel], [ratio], shift, *places, grid.spacing)
            codes.append(self.program.clamped(code, *places, grid.high - grid.low))
        self.codes, self.decode[1] = codes, (np.full(len(codes), grid.step), np.full(len(codes), grid.low * grid.step))

    def _hidden(self, layer: Layer, own: Layer, grid: Grid | None, stage: Stage) -> None:
        """The activations of a hidden layer."""
        (weight, bias), (codes, offset) = (_on(*pair) for pair in zip((layer, own), self.decode, strict=True))
        step = 1.0 if grid is None else grid.step
        made = []
        for i in range(len(bias)):
            (low, high), (least_n, most_n), (least, most) = (
                (float(interval.low[i]), float(interval.high[i]))
                for interval in (stage.floats, stage.fixed, stage.difference)
            )
            a = self.program.rectified(self.floats, weight[i], bias[i], low, high)
            if grid is None:
                code = self.program.rectified(self.codes, codes[i], offset[i], least_n, most_n)
            else:
                ends = least_n / step, most_n / step
                code = self.program.rounded(self.codes, codes[i] / step, offset[i] / step, *ends, grid.spacing)
                code = self.program.clamped(code, *ends, grid.high)
            self.program.row([code, a], [step, -1], least - _SLACK, most + _SLACK)
            made.append((a, code))
        self.floats, self.codes = (list(columns) for columns in zip(*made, strict=True))
        self.decode = [(np.full(len(made), unit), np.zeros(len(made))) for unit in (1.0, step)]

    def greatest(self, output: int, sign: int, seconds: float) -> tuple[float, np.ndarray | None]:
        """The greatest `sign * (quantized - float)` of an output.

        Returns:
            A number that it does not exceed, up to the solver's tolerances, and is if the time suffices; the pixels
            (d,) of the best solution that was found, if any.
        """
        layers = self.twins.layers[-1], self.twins.rounded[-1]
        (weight, bias), (codes, offset) = (_on(*pair) for pair in zip(layers, self.decode, strict=True))
        values = np.concatenate([codes[output], -weight[output]])
        bound, solution = self.program.maximum([*self.codes, *self.floats], sign * values, seconds)
        bound += sign * float(offset[output] - bias[output])
        return bound, None if solution is None else solution[self.pixels].round()


def _on(layer: Layer, decode: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a layer for columns that stand for `column * scale + offset`."""
    scale, offset = decode
    weight = layer.weight.numpy()
    return weight * scale, layer.bias.numpy() + weight @ offset
