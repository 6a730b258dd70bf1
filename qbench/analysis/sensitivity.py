"""What it costs to quantize one layer: measures of it for every layer and bit width."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qbench.analysis.curvature import divergence, fisher_diagonals, hessian_traces
from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.layers import select_layers, weight_of
from qbench.quant.sweep import sweep
from qbench.registry import Reference

Measure = Literal["kl", "sqnr", "hawq", "fisher"]
AnyMeasure = Literal["kl", "loss", "sqnr", "hawq", "fisher"]
Weights = Mapping[int, Mapping[str, Tensor]]
"""Quantized weights by bit width and layer."""
_BATCH = 8  # images at a time where a graph of second derivatives is kept


@dataclass(frozen=True)
class Sensitivity:
    """A measure of every layer at every bit width.

    `kl`: the Kullback-Leibler divergence (nats) of the network's predictions with only this layer quantized from those
    of the float network. `loss`: the increase of the labelled loss, likewise. `sqnr`: the layer's output in the float
    network over its error, in dB. `hawq`: Tr(H) / n * ||W - Q||^2. `fisher`: the sum of E[g^2] (W - Q)^2.
    """

    measure: AnyMeasure
    layers: tuple[str, ...]
    bits: tuple[int, ...]
    values: np.ndarray
    """(layers, bits)"""
    notes: dict[str, Any] = field(default_factory=dict)
    """How it was measured: images, and for `hawq` the traces, their standard errors and the probes."""

    @property
    def losses(self) -> np.ndarray:
        """(layers, bits): what is added up over layers: the measure itself, for `sqnr` noise over signal."""
        return 10 ** (-self.values / 10) if self.measure == "sqnr" else self.values

    @property
    def nats(self) -> np.ndarray | None:
        """(layers, bits): the loss increase that the measure predicts; None where it predicts none.

        The second-order term of the loss has a factor of 1/2, which `hawq` and `fisher` leave out.
        """
        return None if self.measure == "sqnr" else self.values / (2 if self.measure in ("hawq", "fisher") else 1)


def rounded(
    model: nn.Module, data: Data, method: Reference, bits: Iterable[int], skip: tuple[str, ...] = ()
) -> dict[int, dict[str, Tensor]]:
    """The weights of each layer as a method rounds them when all layers have the same bit width.

    Args:
        model: not changed.
        data: what the method sees; nothing is recorded.
        method: with the options `bits` and `skip`.
        bits: the widths.
        skip: layers left out.

    Raises:
        UserError: the method knows no such width.
        Unsupported: the method changes the structure of the network.
    """
    silent = copy.copy(data)
    silent.record, silent.progress = (lambda _name, _values: None), (lambda _: None)
    names = [name for name, _, _ in select_layers(model, 8, skip=skip)]
    found: dict[int, dict[str, Tensor]] = {}
    for width in bits:
        result = method.with_options(bits=width, skip=list(skip))(copy.deepcopy(model), silent)
        modules = dict(result.named_modules())
        if not modules.keys() >= set(names):
            raise Unsupported(f"{method} changes the structure of the network")
        found[width] = {name: weight_of(modules[name]) for name in names}
    return found


def sensitivity(network: nn.Module, weights: Weights, data: Data, measure: AnyMeasure, images: int) -> Sensitivity:
    """Measure every layer at every bit width.

    `kl` and `loss` cost a forward pass of all images for each layer and width, `sqnr` one in all, `hawq` 10 to 50
    Hessian-vector products for each layer, `fisher` one forward and backward pass.

    Args:
        network: float, in evaluation mode.
        weights: the quantized weights of its layers.
        data: its calibration images; for `loss` its training images.
        measure: what to measure.
        images: how many images to use, of those that there are.

    Raises:
        Unsupported: `fisher`, and the network's outputs are no class scores.
        UserError: `loss`, and labels may not be used.
    """
    names, widths = tuple(next(iter(weights.values()))), tuple(weights)
    count = min(images, data.train.images if measure == "loss" else data.calibration.images)
    notes: dict[str, Any] = {"images": count}
    if measure == "loss":
        batches = data.train.epoch(0, batch_size=min(32, count), seed=data.seed, augment=False)
        loss = data.loss
        values = _one_by_one(
            network, weights, _head(batches, count), lambda answers, floats, y: loss(answers, y) - loss(floats, y)
        )
    elif measure == "kl":
        pairs = ((x, None) for x in data.calibration.first(count))
        values = _one_by_one(network, weights, pairs, lambda answers, floats, _: divergence(answers, floats))
    elif measure == "sqnr":
        values = _sqnr(network, weights, data.calibration.first(count))
    elif measure == "hawq":
        traces = hessian_traces(network, names, data.calibration.first(count, _BATCH), seed=data.seed)
        notes |= {"trace": traces.mean, "standard_error": traces.standard_error, "probes": traces.probes}
        values = _weighted(network, weights, {name: torch.tensor(trace) for name, trace in traces.mean.items()})
        values /= np.array([[weights[widths[0]][name].numel()] for name in names])
    else:
        diagonals = fisher_diagonals(network, names, data.calibration.first(count), seed=data.seed)
        values = _weighted(network, weights, diagonals)
    return Sensitivity(measure, names, widths, values, notes)


@contextmanager
def replaced(layer: nn.Module, weight: Tensor) -> Iterator[None]:
    """The layer with another weight."""
    parameter = layer.get_parameter("weight")
    original = parameter.data
    parameter.data = weight.to(original)
    try:
        yield
    finally:
        parameter.data = original


def _head(batches: Iterable[tuple[Tensor, Any]], images: int) -> Iterator[tuple[Tensor, Any]]:
    """Whole batches, as many as there are in so many images."""
    for batch in batches:
        images -= len(batch[0])
        if images < 0:
            return
        yield batch


def _one_by_one(
    network: nn.Module,
    weights: Weights,
    batches: Iterable[tuple[Tensor, Any]],
    score: Callable[[Any, Any, Any], Tensor],
) -> np.ndarray:
    """(layers, bits): the mean over images of `score(answers, float answers, targets)`, with one layer replaced."""
    names, widths = list(next(iter(weights.values()))), list(weights)
    sums, images = np.zeros((len(names), len(widths))), 0
    with torch.no_grad():
        for x, y in batches:
            floats = network(x.clone())
            for (row, name), (column, width) in itertools.product(enumerate(names), enumerate(widths)):
                with replaced(network.get_submodule(name), weights[width][name]):
                    sums[row, column] += float(score(network(x.clone()), floats, y)) * len(x)
            images += len(x)
    return sums / images


def _sqnr(network: nn.Module, weights: Weights, batches: Iterable[Tensor]) -> np.ndarray:
    """(layers, bits): of the layers' outputs, in dB; infinite where there is no error."""
    names = list(next(iter(weights.values())))
    values = np.full((len(names), len(weights)), np.inf)
    for stop in sweep(network, batches, layers=names, walk_reference=False):
        signal, noise = 0.0, np.zeros(len(weights))
        for x in stop.inputs:
            with torch.no_grad():
                wanted = stop.layer(x)
                signal += float(wanted.double().square().sum())
                for column, width in enumerate(weights):
                    with replaced(stop.layer, weights[width][stop.name]):
                        noise[column] += float((stop.layer(x) - wanted).double().square().sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            values[names.index(stop.name)] = np.where(noise > 0, 10 * np.log10(signal / noise), np.inf)
    return values


def _weighted(network: nn.Module, weights: Weights, factors: Mapping[str, Tensor]) -> np.ndarray:
    """(layers, bits): the sum of the factors times the squared changes of the weights."""
    names = list(next(iter(weights.values())))
    values = np.zeros((len(names), len(weights)))
    for (row, name), (column, width) in itertools.product(enumerate(names), enumerate(weights)):
        change = (weight_of(network.get_submodule(name)) - weights[width][name]).double().square()
        values[row, column] = float((change * factors[name].to(change)).sum())
    return values
