"""A block, or a layer outside of blocks, at a stop of the sweep: how it starts, and how it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.dropped_input import DroppedInput, StraightThrough, mixed
from qbench.quant.encodings import Affine
from qbench.quant.fakequant import LearnedInput, keep_positive, quantize_weight
from qbench.quant.input_histograms import observed
from qbench.quant.layers import encode, encodings, full_name, named_weight_layers, output_axis
from qbench.quant.learned_affine import LearnedAffine
from qbench.quant.observers import Histogram
from qbench.quant.reconstruction import Cache, Groups, distance, float_weight, minimise
from qbench.quant.soft_rounding import SoftRounding, fitted_grid
from qbench.quant.sweep import Stop

Start = Literal["nearest", "given"]
Learn = Literal["rounding", "codes"]


@dataclass(frozen=True)
class Settings:
    """The options that block reconstructions share; see `qbench.methods.brecq` and `qbench.methods.qdrop`."""

    bits: int
    activation_bits: int | None
    granularity: Literal["tensor", "channel"]
    symmetric: bool
    start: Start
    learn: Learn
    steps: int
    batch_size: int
    lr: float
    rounding_weight: float
    keep: float
    images: int | None
    edge_bits: int | None
    skip: tuple[str, ...]


@dataclass
class Unit:
    """What is learned at one stop."""

    stop: Stop
    settings: Settings
    generator: torch.Generator
    grids: dict[str, Affine] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    quantizers: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = named_weight_layers(self.stop.layer)
        self.references = named_weight_layers(self.stop.reference_layer)
        self.cache = Cache.gather(self.stop, floats=self.settings.keep < 1)
        biases = {inner: layer.bias for inner, layer in self.layers.items()}
        fixed = encodings(self.stop.layer)
        self.biases = {
            inner: bias.detach().clone()
            for inner, bias in biases.items()
            if isinstance(bias, Tensor) and full_name(inner, "bias") not in fixed
        }

    def _full(self, inner: str) -> str:
        return full_name(self.stop.name, inner)

    def prepare(
        self,
        weights: dict[str, int],
        encoded: dict[str, Affine],
        inputs: dict[str, int],
        given: dict[str, nn.Module],
    ) -> None:
        """The encodings and quantizers of the start: given, or nearest rounding and fitted input ranges.

        Args:
            weights: bits of the layers to quantize, by full names, as all others.
            encoded: encodings to start from.
            inputs: bits of the inputs to quantize.
            given: input quantizers that are there.
        """
        s = self.settings
        for inner, layer in self.layers.items():
            name = self._full(inner)
            if name not in weights:
                continue
            self.floats[inner] = float_weight(name, layer, self.references[inner])
            self.grids[inner] = (
                encoded[name]
                if name in encoded
                else fitted_grid(
                    self.floats[inner],
                    weights[name],
                    symmetric=s.symmetric,
                    granularity=s.granularity,
                    axis=output_axis(layer),
                )
            )
        # Of operands of products, too, which are no layers.
        inside = [inner for inner, _ in self.stop.layer.named_modules()]
        self.quantizers = {i: given[self._full(i)] for i in inside if self._full(i) in given}
        wanted = {i: inputs[self._full(i)] for i in self.layers if self._full(i) in inputs and i not in self.quantizers}
        self.quantizers |= self._fitted(wanted)

    def _fitted(self, widths: dict[str, int]) -> dict[str, nn.Module]:
        """Quantizers for inputs, with the least squared error in the unit with rounded weights."""
        if not widths:
            return {}
        self._encode()
        histograms = {inner: Histogram() for inner in widths}
        with observed({inner: self.layers[inner] for inner in widths}, histograms), torch.no_grad():
            for x in self.cache.inputs.split(self.settings.batch_size):
                self.stop.layer(x.clone())
        fitted: dict[str, nn.Module] = {}
        for inner, histogram in histograms.items():
            if histogram.seen:
                scale, zero = histogram.grid(bits=widths[inner], calibration="mse")
                fitted[inner] = StaticQuantizer(widths[inner], False, scale, zero).to(self.cache.inputs.device)
        return fitted

    def _encode(self) -> None:
        for inner, grid in self.grids.items():
            encode(self.layers[inner], grid)

    def start(self) -> None:
        """Put the start on the unit."""
        self._encode()
        for inner, quantizer in self.quantizers.items():
            quantize_input(self.stop.layer.get_submodule(inner), quantizer)
        with torch.no_grad():
            for inner, bias in self.biases.items():
                self.layers[inner].get_parameter("bias").copy_(bias)

    def learn(self, cache: Cache) -> None:
        """Learn what the weights become, and the steps of the inputs."""
        learned, others = self._loosen()
        if self.settings.learn == "codes":
            self._learn_codes(self._loss(cache), learned)
        else:
            self._learn_roundings(self._loss(cache), learned)
        for put_back in others:
            put_back()

    def _loss(self, cache: Cache) -> Callable[[], Tensor]:
        s, unit = self.settings, self.stop.layer
        order = cache.batches(cache.affordable(s.batch_size), self.generator)

        def loss() -> Tensor:
            chosen = next(order)
            x = cache.inputs[chosen]
            if cache.floats is not None:
                x = mixed(x, cache.floats[chosen], s.keep, self.generator)
            return distance(unit(x), cache.targets[chosen])

        return loss

    def _bound(self) -> None:
        keep_positive(self.stop.layer)

    def _learn_codes(self, loss: Callable[[], Tensor], learned: list[LearnedInput]) -> None:
        """Weights, all steps and biases together."""
        s = self.settings
        groups: Groups = [{"params": [q.scale], "lr": s.lr / 10 * q.scale.item(), "cosine": True} for q in learned]
        for inner, grid in self.grids.items():
            layer = self.layers[inner]
            if s.start == "nearest":
                with torch.no_grad():
                    layer.get_parameter("weight").copy_(self.floats[inner])
            quantizer = LearnedAffine(grid)
            quantize_weight(layer, quantizer)
            original = layer.get_parameter("parametrizations.weight.original")
            groups.append({"params": [original], "lr": s.lr * grid.scale.mean().item(), "cosine": True})
            groups.append({"params": [quantizer.log_scale], "lr": s.lr / 10, "cosine": True})
        size = self.cache.targets.square().mean().sqrt().clamp(min=1e-12).item()
        biases = [self.layers[inner].get_parameter("bias") for inner in self.biases]
        if biases:
            groups.append({"params": biases, "lr": s.lr / 10 * size, "cosine": True})
        minimise(loss, groups, steps=s.steps, after=self._bound)

    def _learn_roundings(self, loss: Callable[[], Tensor], learned: list[LearnedInput]) -> None:
        """Roundings and inputs' steps: together where inputs are dropped, else one after the other."""
        s = self.settings
        roundings = []
        for inner, grid in self.grids.items():
            roundings.append(SoftRounding(self.floats[inner], grid))
            quantize_weight(self.layers[inner], roundings[-1])
        together = s.keep < 1
        minimise(
            loss,
            _steps_of(learned, s.steps) if together else [],
            steps=s.steps,
            roundings=roundings,
            rounding_weight=s.rounding_weight,
            after=self._bound,
        )
        if not together and learned:
            for rounding in roundings:
                rounding.decide()
            steps = max(1, s.steps // 4)
            minimise(loss, _steps_of(learned, steps), steps=steps, after=self._bound)

    def _loosen(self) -> tuple[list[LearnedInput], list[Callable[[], None]]]:
        """Put learned quantizers in place of static ones; others only let gradients through, until put back."""
        learned: list[LearnedInput] = []
        others: list[Callable[[], None]] = []
        for inner, quantizer in self.quantizers.items():
            layer = self.stop.layer.get_submodule(inner)
            if isinstance(quantizer, StaticQuantizer):
                learned.append(DroppedInput(quantizer, self.settings.keep, self.generator))
                quantize_input(layer, learned[-1])
            else:
                quantize_input(layer, StraightThrough(quantizer))
                others.append(lambda layer=layer, quantizer=quantizer: quantize_input(layer, quantizer))  # type: ignore
        return learned, others


def _steps_of(learned: list[LearnedInput], steps: int) -> Groups:
    """Each step may about double or vanish on the way, whatever its size and however many updates there are."""
    return [{"params": [q.scale], "lr": 2 * q.scale.item() / steps, "cosine": True} for q in learned]
