"""The greatest difference of a network and its fixed-point form, by a mixed-integer program (QEBVerif)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from qbench.verify.differences import Stage
from qbench.verify.fixed_point import PIXELS, FixedPoint, Layer
from qbench.verify.program import Program

_SLACK = 1e-7  # what float64 may have rounded of an interval


class Exact:
    """Both networks as one program: pixels and fixed-point activations are whole numbers, ReLU and clamps binary ones.

    The intervals of the differences behind the hidden layers are constraints as well: they change no solution, but are
    what makes it fast.
    """

    def __init__(
        self, layers: Sequence[Layer], form: FixedPoint, low: Tensor, high: Tensor, stages: Sequence[Stage]
    ) -> None:
        """
        Args:
            layers: of the float network.
            form: of the fixed-point network.
            low: least value of each pixel (d,), whole numbers.
            high: greatest value.
            stages: what is known behind each layer.
        """
        self.program = program = Program()
        self.layers, self.rounded = layers, form.quantize(layers)
        one, whole = 2.0**form.fraction, 2.0**form.bits - 1
        self.pixels = [program.variable(*ends, integer=True) for ends in zip(low.tolist(), high.tolist(), strict=True)]
        # What a float activation and a fixed-point code are the columns of, and what they stand for.
        self.floats, self.codes, self.units = self.pixels, self.pixels, (1 / PIXELS, 1 / (PIXELS + 1))
        for layer, own, stage in zip(layers[:-1], self.rounded[:-1], stages[:-1], strict=True):
            unit, step = self.units
            weight, codes = layer.weight.numpy() * unit, own.weight.numpy() * (step * one)
            spacing = step * one / 2 ** (form.bits - 1)
            made = []
            for i, (bias, offset) in enumerate(zip(layer.bias.tolist(), (own.bias * one).tolist(), strict=True)):
                (low_n, high_n), (low_c, high_c), (least, most) = (
                    (float(interval.low[i]), float(interval.high[i]))
                    for interval in (stage.floats, stage.fixed, stage.difference)
                )
                a = program.rectified(self.floats, weight[i], bias, low_n, high_n)
                code = program.rounded(self.codes, codes[i], offset, low_c * one, high_c * one, spacing)
                code = program.clamped(code, low_c * one, high_c * one, whole)
                program.row([code, a], [1 / one, -1], least - _SLACK, most + _SLACK)
                made.append((a, code))
            self.floats, self.codes = (list(columns) for columns in zip(*made, strict=True))
            self.units = (1.0, 1 / one)

    def greatest(self, output: int, sign: int, seconds: float) -> tuple[float, np.ndarray | None]:
        """The greatest `sign * (fixed point - float)` of an output.

        Returns:
            A number that it does not exceed, up to the solver's tolerances, and is if the time suffices; the pixels
            (d,) of the best solution that was found, if any.
        """
        unit, step = self.units
        fixed, floats = self.rounded[-1], self.layers[-1]
        values = np.concatenate([fixed.weight[output].numpy() * step, -floats.weight[output].numpy() * unit])
        bound, solution = self.program.maximum([*self.codes, *self.floats], sign * values, seconds)
        offset = float(fixed.bias[output] - floats.bias[output])
        return bound + sign * offset, None if solution is None else solution[self.pixels].round()
