"""Block reconstruction: roundings and input ranges of a whole block are learned together (BRECQ, QDrop)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.activations import StaticQuantizer, input_quantizer, input_quantizers, quantize_input
from qbench.quant.blocks import blocks
from qbench.quant.encodings import Affine
from qbench.quant.fakequant import LearnedInput, keep_positive, quantize_weight
from qbench.quant.input_histograms import observed
from qbench.quant.layers import encode, named_weight_layers, output_axis, select_layers
from qbench.quant.observers import Histogram
from qbench.quant.reconstruction import Cache, Groups, distance, float_weight, minimise, reconstruct
from qbench.quant.soft_rounding import SoftRounding, fitted_grid
from qbench.quant.sweep import Stop, sweep


@dataclass(frozen=True)
class Settings:
    """The options that block reconstructions share; see `qbench.methods.brecq` and `qbench.methods.qdrop`."""

    bits: int
    activation_bits: int | None
    granularity: Literal["tensor", "channel"]
    symmetric: bool
    steps: int
    batch_size: int
    rounding_weight: float
    keep: float
    images: int | None
    edge_bits: int | None
    skip: tuple[str, ...]


class DroppedInput(LearnedInput):
    """An input quantizer with a learned step, that lets a part of its input through as it is.

    Args:
        start: range and step to begin with; the zero point is kept.
        keep: the probability of each number to be quantized.
        generator: of the choice.
    """

    def __init__(self, start: StaticQuantizer, keep: float, generator: torch.Generator) -> None:
        super().__init__(start.bits)
        self.start, self.keep, self.generator = start, keep, generator
        zero = int(start.zero_point)
        self.low, self.high, self.used = start.low - zero, start.high - zero, True
        self.scale = nn.Parameter(start.scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return mixed(super().forward(x), x, self.keep, self.generator)

    def deployed(self) -> StaticQuantizer:
        start = self.start
        return StaticQuantizer(start.bits, start.symmetric, self.scale.item(), int(start.zero_point))


class StraightThrough(nn.Module):
    """Any other quantizer, with the gradient of the identity."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        quantized: Tensor = self.quantizer(x.detach())
        return x + (quantized - x.detach())


def mixed(quantized: Tensor, x: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """Each number of `quantized` with probability `keep`, else that of `x`."""
    if keep >= 1:
        return quantized
    chance = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device)
    return torch.where(chance < keep, quantized, x)


def reconstruct_blocks(model: nn.Module, data: Data, settings: Settings) -> nn.Module:
    """Quantize block by block in the order of execution, and layers outside of blocks alone.

    The target is each block's output in the float network; the input is that of the network quantized so far.

    Args:
        model: changed in place. Input quantizers that it has are kept; the steps of static ones are learned.
        data: its calibration images, and its float network.
        settings: the options.
    """
    model.eval()
    s = settings
    weights = {name: width for name, _, width in select_layers(model, s.bits, s.edge_bits, s.skip)}
    inputs: dict[str, int] = {}
    if s.activation_bits is not None:
        inputs = {
            name: width
            for name, _, width in select_layers(model, s.activation_bits, s.edge_bits, s.skip, for_inputs=True)
        }
    given = input_quantizers(model)
    for name in given:
        # So that the sweep stops in front of the quantizer, whose step is to be learned.
        quantize_input(model.get_submodule(name), nn.Identity())
    units = _units(model, weights.keys() | inputs.keys() | given.keys(), data.example)
    batches = data.calibration if s.images is None else data.calibration.first(s.images)
    errors: dict[str, tuple[float, float]] = {}
    try:
        for stop in sweep(model, batches, reference=data.reference, layers=units):
            seed = data.seed * 1_000_003 + stop.index
            unit = _Unit(stop, settings, torch.Generator(data.device).manual_seed(seed))
            unit.prepare(weights, inputs, given)
            errors[stop.name] = reconstruct(stop, unit.start, unit.learn, unit.cache)
            data.progress((stop.index + 1) / stop.total)
    finally:
        for name, quantizer in given.items():
            if isinstance(input_quantizer(model.get_submodule(name)), nn.Identity):
                quantize_input(model.get_submodule(name), quantizer)
    data.record("reconstruction_error", errors)
    return model


def _units(model: nn.Module, chosen: set[str], example: Tensor) -> list[str]:
    """The blocks that hold chosen layers, and the chosen layers that are in none."""
    around = {name: block for block in blocks(model, example) for name in chosen if name.startswith(block + ".")}
    wanted = {around.get(name, name) for name in chosen}
    return [name for name, _ in model.named_modules() if name in wanted]


@dataclass
class _Unit:
    """A block, or a layer alone, at a stop."""

    stop: Stop
    settings: Settings
    generator: torch.Generator
    grids: dict[str, Affine] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    quantizers: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = named_weight_layers(self.stop.layer)
        self.references = named_weight_layers(self.stop.reference_layer)
        self.cache = Cache.gather(self.stop)

    def _full(self, inner: str) -> str:
        return f"{self.stop.name}.{inner}" if inner else self.stop.name

    def prepare(self, weights: dict[str, int], inputs: dict[str, int], given: dict[str, nn.Module]) -> None:
        """The encodings and quantizers of the start: nearest rounding, and given or fitted input ranges."""
        s = self.settings
        for inner, layer in self.layers.items():
            name = self._full(inner)
            if name not in weights:
                continue
            weight = float_weight(name, layer, self.references[inner])
            self.floats[inner] = weight
            self.grids[inner] = fitted_grid(
                weight, weights[name], symmetric=s.symmetric, granularity=s.granularity, axis=output_axis(layer)
            )
        # Of operands of products, too, which are no layers.
        inside = (inner for inner, _ in self.stop.layer.named_modules())
        self.quantizers = {inner: given[self._full(inner)] for inner in inside if self._full(inner) in given}
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

    def learn(self, cache: Cache) -> None:
        """Learn roundings and steps: together where inputs are dropped, else one after the other."""
        s, unit = self.settings, self.stop.layer
        roundings = self._soften()
        learned, others = self._loosen()
        order = cache.batches(s.batch_size, self.generator)

        def loss() -> Tensor:
            chosen = next(order)
            x = mixed(cache.inputs[chosen], cache.floats[chosen], s.keep, self.generator)
            return distance(unit(x), cache.targets[chosen])

        def bound() -> None:
            keep_positive(unit)

        together = s.keep < 1
        groups = _steps_of(learned, s.steps)
        minimise(
            loss,
            groups if together else [],
            steps=s.steps,
            roundings=roundings,
            rounding_weight=s.rounding_weight,
            after=bound,
        )
        if not together and learned:
            for rounding in roundings:
                rounding.decide()
            minimise(loss, _steps_of(learned, max(1, s.steps // 4)), steps=max(1, s.steps // 4), after=bound)
        for put_back in others:
            put_back()

    def _soften(self) -> list[SoftRounding]:
        roundings = []
        for inner, grid in self.grids.items():
            rounding = SoftRounding(self.floats[inner], grid)
            quantize_weight(self.layers[inner], rounding)
            roundings.append(rounding)
        return roundings

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
