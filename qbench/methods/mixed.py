"""Mixed precision: a bit width of its own for each layer, within budgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, cast

import numpy as np
import pandas as pd
import torch
from pydantic import AfterValidator, Field
from torch import nn

from qbench import registry
from qbench.analysis.allocation import Budget, Solver, allocate
from qbench.analysis.curvature import divergence
from qbench.analysis.sensitivity import Measure, Sensitivity, rounded, sensitivity
from qbench.analysis.ties import readers
from qbench.data import Batches, Data
from qbench.errors import Unsupported, UserError
from qbench.metrics.coverage import macs
from qbench.quant.activations import input_quantizer
from qbench.quant.heads import head_bits
from qbench.quant.layers import select_layers, weight_of, within
from qbench.registry import Bits, DataFile, MethodReference, method

_OWN = ("bits", "layer_bits", "edge_bits", "skip")


def rounding(text: str) -> str:
    """Check that a method rounds layers to given widths.

    Raises:
        UserError: it does not, or the reference sets what is decided here.
    """
    reference = registry.resolve("method", *registry.parse(text))
    plugin = reference.plugin
    if plugin.attributes["track"] != "ptq" or not {"bits", "layer_bits", "skip"} <= plugin.schema.model_fields.keys():
        raise UserError(f"method {plugin.name!r} does not take a bit width for each layer; use rtn, gptq or gpfq")
    for option in _OWN:
        if option in reference.shown:
            raise UserError(f"{reference}: {option} is decided outside of it; leave it out")
    return text


Rounding = Annotated[MethodReference, AfterValidator(rounding)]
Average = Annotated[float, Field(ge=1, le=16)]


@method("mixed", paper="arXiv:2011.10680")
def mixed(
    model: nn.Module,
    data: Data,
    *,
    method: Rounding = "rtn[calibration=mse]",
    candidates: Annotated[tuple[Bits, ...], Field(min_length=1)] = (8, 6, 4, 3, 2),
    bits: Average | None = 4.0,
    bops: Average | None = None,
    latency: Annotated[float, Field(gt=0)] | None = None,
    latency_table: DataFile = None,
    measure: Measure = "kl",
    solver: Solver = "milp",
    images: Annotated[int, Field(ge=1)] = 64,
    groups: tuple[tuple[str, ...], ...] = (),
    same_input: bool = False,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Choose a bit width for each layer so that the loss is least within budgets, and round by another method.

    HAWQ-V3's integer program over sensitivities. Those are measured, without labels, with the weights that the method
    gives each layer when all layers have the same width. Losses are taken to add up: `mixed` in the result has the
    increase that was predicted beside the one that the rounded network has.

    Args:
        model: changed in place.
        data: its calibration images, and its float network.
        method: how weights are rounded: any method with the options `bits` and `layer_bits`.
        candidates: the widths to choose from.
        bits: the average width of all weights is at most this.
        bops: the same for bit operations (multiply-accumulates times the bits of weight and input): no more than if all
            weights had this width. Inputs without a quantizer count 32 bits.
        latency: the sum over layers of the table's times is at most this.
        latency_table: CSV file with the columns `layer`, `bits` and `latency`, one row for each layer and candidate.
        measure: what is added up over layers: `kl`, the divergence of the network's predictions with only that layer
            rounded; `sqnr`, noise over signal of the layer's output; `hawq`, mean curvature (Hutchinson) times squared
            rounding error; `fisher`, squared rounding errors weighted with squared gradients.
        solver: `milp` is exact; `greedy` lowers from the widest, layer by layer, what costs least for what it saves.
        images: so many calibration images are used for the measure, or all if there are fewer.
        groups: lists of names, or first parts of names, of layers that get the same width.
        same_input: layers that read the same tensor get the same width.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        UserError: the budgets cannot be met, there is none, the table lacks a layer or a width, or `head_bits` went
            before.
        Unsupported: the measure needs class scores, and the outputs are something else.
    """
    if head_bits(model):
        raise UserError("mixed chooses the widths of all layers: leave head_bits out, or set them together with groups")
    model.eval()
    reference = data.reference if data.reference is not None else model
    outer = registry.resolve("method", *registry.parse(method))
    widths = tuple(sorted(set(candidates), reverse=True))
    layers = {name: layer for name, layer, _ in select_layers(model, widths[0], skip=skip)}
    budgets = []
    if bits is not None:
        budgets.append(_average("bits", [weight_of(layer).numel() for layer in layers.values()], widths, bits))
    if bops is not None:
        budgets.append(_average("bops", _input_bits(model, data, layers), widths, bops))
    if latency is not None:
        budgets.append(Budget("latency", _times(latency_table, list(layers), widths), latency))
    if not budgets:
        raise UserError("mixed: give a budget: bits, bops or latency")
    tied = _grouped(list(layers), groups) + (readers(model, layers, data.example) if same_input else [])
    weights = rounded(model, data, outer, widths, skip)
    found = sensitivity(reference, weights, data, measure, images)
    ties = [[found.layers.index(name) for name in names] for names in tied]
    chosen = allocate(found.losses, budgets, ties, solver)
    layer_bits = {name: widths[column] for name, column in zip(layers, chosen, strict=True)}
    result: nn.Module = outer.with_options(layer_bits=layer_bits, skip=list(skip))(model, data)
    actual = _divergence(result.eval(), reference, data.calibration.first(min(images, data.calibration.images)))
    data.record("mixed", _summary(found, chosen, budgets) | {"actual": actual})
    data.record("mixed_bits", layer_bits)
    losses = [dict(zip(map(str, widths), row, strict=True)) for row in found.losses.tolist()]
    data.record("mixed_sensitivity", found.notes | {"losses": dict(zip(layers, losses, strict=True))})
    return result


def _average(name: str, shares: Sequence[float], widths: Sequence[int], limit: float) -> Budget:
    """What all layers cost at the width `limit`, a layer costing its share times its width."""
    return Budget(name, np.outer(np.array(shares, dtype=float), widths), limit * float(sum(shares)))


def _input_bits(model: nn.Module, data: Data, layers: Mapping[str, nn.Module]) -> list[float]:
    """Of each layer: its multiply-accumulates for an image, times the bits of its inputs."""
    _, by_layer = macs(model, data.example)
    quantizers = {name: input_quantizer(layer) for name, layer in layers.items()}
    return [
        by_layer.get(name, 0) * (32 if quantizer is None else cast(int, quantizer.bits))
        for name, quantizer in quantizers.items()
    ]


def _times(file: str | None, names: Sequence[str], widths: Sequence[int]) -> np.ndarray:
    """(layers, widths): the latencies of the table."""
    if file is None:
        raise UserError(
            "mixed: the budget latency needs a latency_table, a CSV file with the columns layer,bits,latency"
        )
    try:
        table = pd.read_csv(file).pivot(index="layer", columns="bits", values="latency")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"mixed: latency_table {file} is not a CSV file with the columns layer,bits,latency: {error}"
        ) from None
    times = table.reindex(index=list(names), columns=list(widths)).to_numpy(dtype=float)
    if len(missing := np.argwhere(~(times >= 0))):
        row, column = missing[0]
        raise UserError(f"mixed: latency_table {file} has no latency of {names[row]} at {widths[column]} bits; add it")
    return times


def _grouped(names: Sequence[str], groups: Iterable[Iterable[str]]) -> list[list[str]]:
    found = []
    for group in groups:
        for prefix in group:
            if not any(within(name, prefix) for name in names):
                raise UserError(f"mixed: groups: no layer is named {prefix!r} or begins with {prefix + '.'!r}")
        found.append([name for name in names if any(within(name, prefix) for prefix in group)])
    return found


def _divergence(network: nn.Module, reference: nn.Module, batches: Batches) -> float | None:
    """Of the network's predictions from the reference's, in nats; None where outputs are no class scores."""
    total = 0.0
    with torch.no_grad():
        for x in batches:
            try:
                total += float(divergence(network(x.clone()), reference(x.clone()))) * len(x)
            except Unsupported:
                return None
    return total / batches.images


def _summary(found: Sensitivity, chosen: np.ndarray, budgets: Sequence[Budget]) -> dict[str, Any]:
    rows = np.arange(len(chosen))
    return {
        "measure": found.measure,
        "objective": float(found.losses[rows, chosen].sum()),
        "spent": {budget.name: float(budget.costs[rows, chosen].sum() / budget.limit) for budget in budgets},
        "predicted": None if found.nats is None else float(found.nats[rows, chosen].sum()),
    }
