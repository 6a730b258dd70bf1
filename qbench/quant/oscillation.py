"""What weights and steps do while a network is trained: codes change back and forth, steps do not come to rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant.encodings import Affine
from qbench.quant.free_weights import free_weight, quantized_layers, weight_encoding
from qbench.quant.rows import to_rows
from qbench.quant.step_search import best_step, squared_error
from qbench.quant.training import Step

_POINTS = 200
"""Codes are looked at after so many steps of the training at most, and after those that follow them."""


class Oscillation:
    """Watches the quantizers of a model's weights; what it has seen is kept in the training's memory."""

    def __init__(self, model: nn.Module, memory: dict[str, Any]) -> None:
        self.layers, self.memory = quantized_layers(model), memory
        exponents, codes = self._exponents(), self._codes()
        memory["oscillation"] = {
            "done": 0.0,
            "steps": 0,
            "pairs": 0,
            "exponents": exponents,
            "codes": codes,
            "exponent_flips": dict.fromkeys(exponents, 0),
            "code_flips": dict.fromkeys(codes, 0),
        }

    def see(self, step: Step) -> None:
        """Count what the step has changed; codes only after some steps."""
        known = self.memory["oscillation"]
        before, known["done"], known["steps"] = known["done"], step.done, step.number + 1
        exponents = self._exponents()
        _count(known["exponent_flips"], known["exponents"], exponents)
        known["exponents"] = exponents
        due = int(before * _POINTS) < int(step.done * _POINTS)
        codes = self._codes() if known["codes"] or due else {}
        if known["codes"]:
            known["pairs"] += 1
            _count(known["code_flips"], known["codes"], codes)
        known["codes"] = codes if due else {}

    def record(self) -> dict[str, Any]:
        """How many of the `exponents` and `codes` of each layer were seen to flip, in `steps` and in `pairs` of steps.

        `error` is the squared error of rounding a layer's weights to its grid in the end, `least_error` that with the
        best steps; both only of uniform grids that have a code for 0.
        """
        known = self.memory["oscillation"]
        errors = {name: self._errors(layer) for name, (layer, _) in self.layers.items()}
        found = {name: pair for name, pair in errors.items() if pair is not None}
        return {
            **{key: known[key] for key in ("steps", "pairs", "exponent_flips", "code_flips")},
            "exponents": {name: exponents.numel() for name, exponents in known["exponents"].items()},
            "codes": {name: free_weight(self.layers[name][0]).numel() for name in known["code_flips"]},
            "error": {name: own for name, (own, _) in found.items()},
            "least_error": {name: least for name, (_, least) in found.items()},
        }

    @torch.no_grad()
    def _exponents(self) -> dict[str, Tensor]:
        powers = {name: own for name, (_, own) in self.layers.items() if getattr(own, "power_of_two", False)}
        return {name: own.scale.log2().round() for name, own in powers.items()}  # type: ignore[operator]

    def _codes(self) -> dict[str, Tensor]:
        encodings = {name: weight_encoding(layer) for name, (layer, _) in self.layers.items()}
        return {name: found.codes.to(torch.int16) for name, found in encodings.items() if hasattr(found, "codes")}

    @torch.no_grad()
    def _errors(self, layer: nn.Module) -> tuple[float, float] | None:
        encoding = weight_encoding(layer)
        if not isinstance(encoding, Affine) or encoding.zero_point is not None:
            return None
        scale = encoding.scale[:, 0]
        rows = to_rows(free_weight(layer).float(), encoding.axis)
        rows = rows if len(scale) > 1 else rows.reshape(1, -1)
        best = best_step(rows, encoding.low, encoding.high)
        own, least = (squared_error(rows, step, encoding.low, encoding.high).sum().item() for step in (scale, best))
        return own, least


def _count(flips: dict[str, int], before: dict[str, Tensor], now: dict[str, Tensor]) -> None:
    """Add up how many numbers of each layer are others than before, which may come from a file."""
    for name, numbers in now.items():
        flips[name] += int((before[name].to(numbers.device) != numbers).sum())
