"""Quantization-aware training: what every method does around its quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.activations import quantize_input
from qbench.quant.distillation import Objective
from qbench.quant.fakequant import deploy, keep_positive, quantize_weight, quantizers, reached
from qbench.quant.free_weights import update_quantizers
from qbench.quant.layers import clear_encodings, named_weight_layers, output_axis, select_layers, weight_of
from qbench.quant.oscillation import Oscillation
from qbench.quant.schedule import Schedule
from qbench.quant.training import Groups, Step, decay_groups, fit

WeightFactory = Callable[[Tensor, int, int], nn.Module]
"""`(weight, bits, axis of the output channels) -> fakequant.WeightQuantizer`"""
InputFactory = Callable[[int], nn.Module]
"""`bits -> fakequant.InputQuantizer`, which sets itself from the first batch it sees."""
_POINTS = 100


def train_quantized(
    model: nn.Module,
    data: Data,
    schedule: Schedule,
    weight: WeightFactory,
    inputs: InputFactory,
    *,
    name: str,
    bits: int,
    activation_bits: int | None,
    edge_bits: int | None = None,
    skip: tuple[str, ...] = (),
    layer_bits: Mapping[str, int] | None = None,
    objective: Objective | None = None,
    groups: Groups | None = None,
    on_step: Callable[[Step], None] | None = None,
    memory: dict[str, Any] | None = None,
) -> nn.Module:
    """Put quantizers on weights and inputs, train, and put what was learned in their place.

    `data.record(name, ...)` gets `state`: the mean of every parameter and scale of every quantizer at the start, at up
    to 100 of the `steps`, and at the end; and `deployed_difference`: the largest difference of outputs of the first
    calibration batch between the trained and the deployed network. `oscillation` gets what `Oscillation` saw.

    Args:
        model: the float model.
        data: with training images.
        schedule: of the training.
        weight: makes the quantizer of a weight.
        inputs: makes the quantizer of a layer's input.
        name: of the record, that of the method.
        bits: of the weights.
        activation_bits: of the inputs of the same layers; None leaves them in float.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        layer_bits: of single layers, weights and inputs alike.
        objective: what is minimised; None is the task's loss.
        groups: parameter groups; None is `quantizer_groups`.
        on_step: called after every step.
        memory: what `on_step` remembers, as for `fit`.

    Raises:
        Unsupported: distillation is asked for, and there is no float network or its outputs are not logits.
    """
    images = next(iter(data.calibration))
    attach(model, images, weight, inputs, bits, activation_bits, edge_bits=edge_bits, skip=skip, layer_bits=layer_bits)
    memory = {} if memory is None else memory
    history, oscillation = _History(model, memory), Oscillation(model, memory)

    def after(step: Step) -> None:
        keep_positive(model)
        update_quantizers(model)
        history.see(step)
        oscillation.see(step)
        if on_step is not None:
            on_step(step)

    learned = groups or quantizer_groups(schedule)
    fit(model, data, schedule, objective=objective, groups=learned, on_step=after, memory=memory)
    history.add()
    data.record("oscillation", oscillation.record())
    data.record(name, {**history.record(), "deployed_difference": _deploy(model, images)})
    return model


def attach(
    model: nn.Module,
    images: Tensor,
    weight: WeightFactory,
    inputs: InputFactory,
    bits: int,
    activation_bits: int | None,
    *,
    edge_bits: int | None = None,
    skip: tuple[str, ...] = (),
    layer_bits: Mapping[str, int] | None = None,
) -> None:
    """Put quantizers on weights and inputs, and let them see the first images; arguments as for `train_quantized`."""
    chosen = list(select_layers(model, bits, edge_bits, skip, layer_bits))
    fed = (
        list(select_layers(model, activation_bits, edge_bits, skip, layer_bits, for_inputs=True))
        if activation_bits
        else []
    )
    calls = reached(model.eval(), images)
    for layer in named_weight_layers(model).values():
        clear_encodings(layer)
    made = {
        id(layer.weight): weight(weight_of(layer), width, output_axis(layer)).to(images.device)
        for _, layer, width in chosen
    }
    for layer in named_weight_layers(model).values():
        # All layers that share a weight see what is learned of it.
        if (quantizer := made.get(id(layer._parameters.get("weight")))) is not None:
            quantize_weight(layer, quantizer)
    for layer_name, layer, width in fed:
        if layer_name in calls:
            quantizer = inputs(width).to(images.device)
            quantizer.register_forward_pre_hook(_in_float32)
            quantize_input(layer, quantizer)
    with torch.no_grad():
        model(images)


def _in_float32(_quantizer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Codes of 8 bits do not survive the arithmetic of bfloat16, in which layers may compute."""
    return tuple(x.float() for x in args)


def quantizer_groups(schedule: Schedule) -> Groups:
    """Parameters of quantizers do not decay, and learn as the quantizer's `learning` says, by their names.

    Updates of AdamW do not depend on the size of the gradient: there each of the others learns with `lr` times its own
    size, or `lr` if it is 0.
    """

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        own: dict[int, dict[str, Any]] = {}
        for quantizer in quantizers(model).values():
            for name, parameter in quantizer.named_parameters():
                own[id(parameter)] = group(parameter, getattr(quantizer, "learning", {}).get(name, {}))
        others = (parameter for parameter in model.parameters() if id(parameter) not in own)
        return [*decay_groups(others, schedule.weight_decay), *own.values()]

    def group(parameter: nn.Parameter, learning: dict[str, float]) -> dict[str, Any]:
        relative = {"lr": schedule.lr * _size(parameter)} if schedule.optimizer == "adamw" else {}
        return {"params": [parameter], "weight_decay": 0.0, **relative, **learning}

    return groups


def _size(parameter: Tensor) -> float:
    return parameter.detach().abs().mean().item() or 1.0


class _History:
    """The means of what the quantizers learn or compute, over time, kept in the training's memory."""

    def __init__(self, model: nn.Module, memory: dict[str, Any]) -> None:
        self.model, self.memory = model, memory
        memory["history"] = {"now": 0, "done": 0.0, "steps": [], "state": {}}
        self.add()

    def see(self, step: Step) -> None:
        """Add a point if it is time to."""
        known = self.memory["history"]
        before, known["done"], known["now"] = known["done"], step.done, step.number + 1
        if int(before * _POINTS) < int(step.done * _POINTS) < _POINTS:
            self.add()

    def add(self) -> None:
        """The state of now."""
        known = self.memory["history"]
        known["steps"].append(known["now"])
        for name, quantizer in quantizers(self.model).items():
            for key, parameter in (*quantizer.named_parameters(), *_computed(quantizer)):
                known["state"].setdefault(f"{name}.{key}", []).append(parameter.detach().mean().item())

    def record(self) -> dict[str, Any]:
        return {key: self.memory["history"][key] for key in ("steps", "state")}


def _computed(quantizer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The scale of a quantizer that does not learn it."""
    scale = getattr(quantizer, "scale", None)
    if isinstance(scale, Tensor) and "scale" not in quantizer._parameters:
        yield "scale", scale


@torch.no_grad()
def _deploy(model: nn.Module, images: Tensor) -> float:
    """Largest difference of the outputs that deploying makes."""
    trained = _flat(model(images))
    deploy(model)
    return (_flat(model(images)) - trained).abs().max().item()


def _flat(outputs: Any) -> Tensor:
    """All numbers of a network's output, whatever its structure."""
    if isinstance(outputs, Tensor):
        return outputs.flatten()
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return torch.cat([_flat(value) for value in values])
