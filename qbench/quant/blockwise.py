"""Block reconstruction: what a whole block's weights and input ranges become is learned together (BRECQ, QDrop)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.quant.activations import StaticQuantizer, input_quantizer, input_quantizers, quantize_input
from qbench.quant.block_unit import Settings, Unit
from qbench.quant.blocks import blocks
from qbench.quant.encodings import Affine
from qbench.quant.input_histograms import input_histograms
from qbench.quant.layers import encodings, full_name, select_layers
from qbench.quant.learned_affine import LearnedAffine
from qbench.quant.reconstruction import reconstruct
from qbench.quant.sweep import sweep


def reconstruct_blocks(model: nn.Module, data: Data, settings: Settings) -> nn.Module:
    """Quantize block by block in the order of execution, and layers outside of blocks alone.

    The target is each block's output in the float network; the input is that of the network quantized so far.

    Args:
        model: changed in place. Input quantizers that it has are kept; the steps of static ones are learned.
        data: its calibration images, and its float network.
        settings: the options.

    Raises:
        Unsupported: a layer to start from as it is has no uniform codes.
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
    start = _given(model, weights) if s.start == "given" else {}
    units = _units(model, weights.keys() | inputs.keys() | given.keys(), data.example)
    batches = data.calibration if s.images is None else data.calibration.first(s.images)
    errors: dict[str, tuple[float, float]] = {}
    try:
        for stop in sweep(model, batches, reference=data.reference, layers=units):
            seed = data.seed * 1_000_003 + stop.index
            unit = Unit(stop, settings, torch.Generator(data.device).manual_seed(seed))
            unit.prepare(weights, start, inputs, given)
            errors[stop.name] = reconstruct(stop, unit.start, unit.learn, unit.cache)
            data.progress((stop.index + 1) / stop.total)
    finally:
        for name, quantizer in given.items():
            if isinstance(input_quantizer(model.get_submodule(name)), nn.Identity):
                quantize_input(model.get_submodule(name), quantizer)
    _quantize_rest(model, data, batches, inputs)
    data.record("reconstruction_error", errors)
    return model


def _quantize_rest(model: nn.Module, data: Data, batches: Batches, widths: Mapping[str, int]) -> None:
    """Quantize the inputs that no unit has: of layers that have the weight of one in a unit."""
    layers = {name: model.get_submodule(name) for name in widths}
    rest = {name: layer for name, layer in layers.items() if input_quantizer(layer) is None}
    for name, histogram in (input_histograms(model, rest, data, batches) if rest else {}).items():
        scale, zero = histogram.grid(bits=widths[name], calibration="mse")
        quantize_input(rest[name], StaticQuantizer(widths[name], False, scale, zero).to(data.device))


def _units(model: nn.Module, chosen: set[str], example: Tensor) -> list[str]:
    """The blocks that hold chosen layers, and the chosen layers that are in none."""
    around = {name: block for block in blocks(model, example) for name in chosen if name.startswith(block + ".")}
    wanted = {around.get(name, name) for name in chosen}
    return [name for name, _ in model.named_modules() if name in wanted]


def _given(model: nn.Module, chosen: Iterable[str]) -> dict[str, Affine]:
    """The encodings that the chosen layers have."""
    attached = encodings(model)
    found: dict[str, Affine] = {}
    for name in chosen:
        encoding = attached.get(full_name(name, "weight"))
        if not isinstance(encoding, Affine) or not LearnedAffine.accepts(encoding):
            kind = "no codes" if encoding is None else "other codes than uniform ones with whole zero points"
            raise Unsupported(f"start=given needs quantized layers, but {name} has {kind}; put gptq or rtn in front")
        found[name] = encoding
    return found
