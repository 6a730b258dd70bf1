"""Brevitas's post-training quantization, as a baseline."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.encodings import Affine
from qbench.quant.layers import WEIGHT_LAYERS, named_weight_layers, output_axis, select_layers
from qbench.registry import EdgeBits, method
from qbench.runtimes.padding import same_padding
from qbench.toolkits.adopt import pad_first, prepare, put_parameters, put_quantizer, record, require
from qbench.toolkits.agreement import compare
from qbench.toolkits.exported import affine, grid


@method("brevitas")
def brevitas(
    model: nn.Module,
    data: Data,
    *,
    rounding: Literal["rtn", "gptq", "gpfq", "learned_round"] = "rtn",
    bits: Annotated[int, Field(ge=2, le=8)] = 8,
    activation_bits: Annotated[int, Field(ge=2, le=8)] = 8,
    bias_correction: bool = True,
    steps: Annotated[int, Field(ge=1)] = 1000,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Quantize with Brevitas: its layers instead of convolutions and linear layers, calibrated and rounded.

    Weights have a scale for each output channel and no zero point, inputs of layers a scale and a zero point, between
    the percentiles 0.001 and 99.999.

    Args:
        model: changed in place; batch norms are folded.
        data: its calibration images.
        rounding: to nearest, by Brevitas's GPTQ or GPFQ, or learned layer by layer (AdaRound).
        bits: width of the codes of weights.
        activation_bits: width of the codes of inputs.
        bias_correction: Brevitas's, after rounding.
        steps: of learned rounding, for each layer, with one image each.
        edge_bits: bits of weights and inputs of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: Brevitas is not installed.
    """
    require("brevitas", *(["accelerate"] if rounding == "learned_round" else []), extra="brevitas")
    floats = prepare(model, data, exposed=False)
    widths = {name: width for name, _, width in select_layers(model, bits, edge_bits, skip)}
    inputs = {name: width for name, _, width in select_layers(model, activation_bits, edge_bits, skip)}
    quantized = _layers(copy.deepcopy(floats), widths, inputs)
    for name, pad in same_padding(model, data.example).items():
        pad_first(quantized.get_submodule(name), pad)
    batches = [batch.cpu() for batch in data.calibration]
    with torch.no_grad():
        _calibrate(quantized, batches)
    _ROUNDINGS[rounding](quantized, batches, steps)
    if bias_correction:
        with torch.no_grad():
            _correct_biases(quantized, batches)
    for name in widths:
        _adopt(model, name, quantized.get_submodule(name))
    agreement = compare(model, quantized, floats, data.calibration, "brevitas", lambda x, s, z: (x / s + z).round())
    record(model, data, "brevitas", agreement)
    return model


def _layers(network: nn.Module, weights: dict[str, int], inputs: dict[str, int]) -> nn.Module:
    """The network with Brevitas's layers, of the widths of weights and inputs that go with their names."""
    from brevitas import nn as layers
    from brevitas.core.scaling.standalone import ParameterFromStatsFromParameterScaling
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloat
    from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloat

    kinds = {kind: getattr(layers, f"Quant{kind.__name__}") for kind in WEIGHT_LAYERS}
    for widths in sorted({(weights[name], inputs[name]) for name in weights}):
        options = {
            # The scale stays what it is for the float weights while they are changed.
            "weight_quant": Int8WeightPerChannelFloat.let(
                bit_width=widths[0], scaling_impl=ParameterFromStatsFromParameterScaling
            ),
            "input_quant": ShiftedUint8ActPerTensorFloat.let(bit_width=widths[1]),
            "bias_quant": None,
            "return_quant_tensor": False,
        }
        others = [n for n in named_weight_layers(network) if n not in weights or (weights[n], inputs[n]) != widths]
        layerwise_quantize(network, {kind: (own, options) for kind, own in kinds.items()}, name_blacklist=others)
    return network.eval()


def _calibrate(network: nn.Module, batches: list[Tensor]) -> None:
    from brevitas.graph.calibrate import calibration_mode

    network(batches[0][:1])  # makes the scales of weights
    with calibration_mode(network):
        for batch in batches:
            network(batch)


def _correct_biases(network: nn.Module, batches: list[Tensor]) -> None:
    from brevitas.graph.calibrate import bias_correction_mode

    with bias_correction_mode(network):
        for batch in batches:
            network(batch)


# ---------------------------------------------------------------------------------------------------- roundings


def _rtn(network: nn.Module, batches: list[Tensor], steps: int) -> None:
    """Nothing is left to do."""


def _gptq(network: nn.Module, batches: list[Tensor], steps: int) -> None:
    from brevitas.graph.gptq import gptq_mode

    _layer_by_layer(gptq_mode(network, use_quant_activations=True), batches)


def _gpfq(network: nn.Module, batches: list[Tensor], steps: int) -> None:
    from brevitas.graph.gpfq import gpfq_mode

    _layer_by_layer(gpfq_mode(network), batches)


@torch.no_grad()
def _layer_by_layer(mode: Any, batches: list[Tensor]) -> None:
    with mode:
        for _ in range(mode.num_layers):
            for batch in batches:
                mode.model(batch)
            mode.update()


def _learned_round(network: nn.Module, batches: list[Tensor], steps: int) -> None:
    """As Brevitas's example does, in float32."""
    from brevitas_examples.common.learned_round import learned_round_trainer as trainer
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils as vision

    config = vision.parse_args_to_dataclass(
        Namespace(
            learned_round="hard_sigmoid",
            learned_round_loss="regularised_mse",
            learned_round_lr=1e-3,
            learned_round_lr_scheduler=None,
            learned_round_iters=steps,
            learned_round_batch_size=1,
        )
    )
    config.training_args.use_amp = False
    config.training_args.losses_args[0].kwargs = {"max_count": steps}
    trainer.LearnedRoundTrainer(config=config).train(
        model=network,
        model_forward=vision.vision_forward,
        block_forward=vision.vision_block_forward,
        data_loader=[(batch, None) for batch in batches],
        cache=vision.CacheVision(),
        get_blocks_fn=partial(trainer.get_blocks, block_check_fn=vision.is_layer),
    )


_ROUNDINGS: dict[str, Callable[[nn.Module, list[Tensor], int], None]] = {
    "rtn": _rtn,
    "gptq": _gptq,
    "gpfq": _gpfq,
    "learned_round": _learned_round,
}


def _adopt(model: nn.Module, name: str, layer: Any) -> None:
    """Codes, bias and input quantizer of Brevitas's layer."""
    with torch.no_grad():
        weight, inputs = layer.quant_weight(), layer.input_quant
        top = 2 ** (int(weight.bit_width) - 1) - 1
        low = -top if layer.weight_quant.is_narrow_range else -top - 1
        parameters: dict[str, Affine | Tensor] = {
            f"{name}.weight": affine(
                weight.int(), weight.scale, weight.zero_point, low, top, output_axis(model.get_submodule(name))
            )
        }
        if layer.bias is not None:
            parameters[f"{name}.bias"] = layer.bias.detach()
        put_parameters(model, parameters, "brevitas")
        levels = 2 ** int(inputs.bit_width())
        put_quantizer(model, name, grid(inputs.scale(), inputs.zero_point(), 0, levels - 1), "brevitas")
