"""LSQ: quantization-aware training with learned step sizes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.activations import input_quantizers, quantize_input
from qbench.quant.fakequant import (
    Granularity,
    LearnedInput,
    LearnedWeight,
    deploy,
    keep_positive,
    quantize_weight,
    reached,
    weight_quantizer,
)
from qbench.quant.layers import clear_encodings, named_weight_layers, output_axis, select_layers, weight_of
from qbench.quant.training import Objective, decay_groups, fit
from qbench.registry import method

LowBits = Annotated[int, Field(ge=2, le=8)]
Chosen = tuple[str, nn.Module, int]
"""Name, layer and bits."""
_TEMPERATURE = 4.0


@method("lsq", track="qat", paper="arXiv:1902.08153")
def lsq(
    model: nn.Module,
    data: Data,
    *,
    bits: LowBits = 4,
    activation_bits: LowBits | None = 4,
    granularity: Granularity = "tensor",
    edge_bits: LowBits | Literal[32] | None = 8,
    skip: tuple[str, ...] = (),
    epochs: Annotated[int, Field(ge=1)] = 10,
    steps: Annotated[int, Field(ge=1)] | None = None,
    batch_size: Annotated[int, Field(ge=1)] = 64,
    lr: Annotated[float, Field(gt=0)] = 0.01,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4,
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0,
) -> nn.Module:
    """Train the network with quantized weights and inputs whose step sizes are learned with it (LSQ).

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights, whose codes are signed.
        activation_bits: of the inputs of the same layers, signed where the first batch has negative values; None
            leaves them in float.
        granularity: one step per weight tensor or per output channel.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        epochs: passes over the training images.
        steps: batches to train on, in place of `epochs`.
        batch_size: images per step.
        lr: highest learning rate; it falls to 0 along a cosine.
        optimizer: `sgd` with momentum 0.9 as in the paper, or `adamw`.
        weight_decay: of the weights.
        distillation: share of the loss that asks for the float network's soft answers (temperature 4).

    Raises:
        Unsupported: distillation is asked for, and there is no float network or its outputs are not logits.
    """
    images = next(iter(data.calibration))
    weights = select_layers(model, bits, edge_bits, skip)
    inputs = select_layers(model, activation_bits, edge_bits, skip, for_inputs=True) if activation_bits else ()
    _attach(model.eval(), images, list(weights), list(inputs), granularity)
    start = _steps(model)
    fit(
        model,
        data,
        epochs=None if steps else epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        weight_decay=weight_decay,
        objective=_distil(data, distillation) if distillation else None,
        groups=lambda net: _groups(net, weight_decay, lr if optimizer == "adamw" else None),
        on_step=lambda step: keep_positive(step.model),
    )
    end = _steps(model)
    with torch.no_grad():
        trained = _flat(model(images))
        deploy(model)
        difference = (_flat(model(images)) - trained).abs().max().item()
    data.record("lsq", {"steps_at_start": start, "steps_at_end": end, "deployed_difference": difference})
    return model


def _attach(
    model: nn.Module, images: Tensor, weights: list[Chosen], inputs: list[Chosen], granularity: Granularity
) -> None:
    """Quantizers on weights and inputs, with their first steps set."""
    calls = reached(model, images)
    for layer in named_weight_layers(model).values():
        clear_encodings(layer)
    for _, layer, width in weights:
        quantize_weight(layer, LearnedWeight(weight_of(layer), width, granularity, output_axis(layer)))
    for name, layer, width in inputs:
        if name in calls:
            quantize_input(layer, LearnedInput(width).to(images.device))
    with torch.no_grad():
        model(images)


def _quantizers(model: nn.Module) -> dict[str, LearnedWeight | LearnedInput]:
    weights = {f"{name}.weight": weight_quantizer(layer) for name, layer in named_weight_layers(model).items()}
    inputs = {f"{name}.input": quantizer for name, quantizer in input_quantizers(model).items()}
    return {k: q for k, q in (weights | inputs).items() if isinstance(q, (LearnedWeight, LearnedInput))}


def _steps(model: nn.Module) -> dict[str, float]:
    """The step of every quantizer; where it has one per channel, their mean."""
    return {name: quantizer.scale.mean().item() for name, quantizer in _quantizers(model).items()}


def _groups(model: nn.Module, weight_decay: float, relative_lr: float | None) -> list[dict[str, Any]]:
    """Steps do not decay. `relative_lr` is for optimizers whose updates do not depend on the gradient's size: times
    the step's own size it is the learning rate."""
    scales = [quantizer.scale for quantizer in _quantizers(model).values()]
    known = {id(scale) for scale in scales}
    others = decay_groups((p for p in model.parameters() if id(p) not in known), weight_decay)
    if relative_lr is None:
        return [*others, {"params": scales, "weight_decay": 0.0}]
    own = [{"params": [s], "weight_decay": 0.0, "lr": relative_lr * s.detach().mean().item()} for s in scales]
    return [*others, *own]


def _distil(data: Data, share: float) -> Objective:
    teacher = data.reference
    if teacher is None:
        raise Unsupported("there is no float network to distil from")
    teacher.eval()

    def objective(net: nn.Module, x: Tensor, y: Any) -> Tensor:
        own = net(x)
        with torch.no_grad():
            soft = teacher(x)
        if not isinstance(own, Tensor) or own.dim() != 2:
            raise Unsupported("distillation needs a classifier, whose output is (B, classes)")
        log_own, log_soft = (F.log_softmax(z.float() / _TEMPERATURE, dim=1) for z in (own, soft))
        apart = F.kl_div(log_own, log_soft, reduction="batchmean", log_target=True) * _TEMPERATURE**2
        return (1 - share) * data.loss(own, y) + share * apart

    return objective


def _flat(outputs: Any) -> Tensor:
    """All numbers of a network's output, whatever its structure."""
    if isinstance(outputs, Tensor):
        return outputs.flatten()
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return torch.cat([_flat(value) for value in values])
