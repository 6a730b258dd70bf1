"""Widen a network, train it quantized, and squeeze what turns out to be redundant."""

from __future__ import annotations

import copy
import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.binary import BinaryInput
from qbench.quant.channel_selection import Channels, add_constants, constants, select, selectable
from qbench.quant.distillation import Objective
from qbench.quant.fakequant import LearnedInput, detach, keep_positive
from qbench.quant.layers import select_layers
from qbench.quant.matching import add_projections, distance, drop_projections, features
from qbench.quant.one_bit import EdgeBits, one_bit_layers, weight_of_bits
from qbench.quant.qat import attach, quantizer_groups, train_quantized
from qbench.quant.rectifiers import drop_rectifiers
from qbench.quant.schedule import Schedule
from qbench.quant.training import Step, fit, joined, steps_per_epoch
from qbench.registry import method

Width = Annotated[int, Field(ge=1, le=8)]
_NOISE = 0.2  # of copies, relative to the weights
_SQUEEZED = 0.6  # of the training, when channels are removed
_PENALIZED = 0.5  # of the time before, when the penalty begins


@method("widen_squeeze", track="qat", paper="arXiv:2002.00555", in_the_manner_of=True)
def widen_squeeze(
    model: nn.Module,
    data: Data,
    *,
    bits: Width = 1,
    activation_bits: Width | None = 1,
    factor: Annotated[int, Field(ge=1, le=4)] = 2,
    matching: Annotated[float, Field(ge=0)] = 1.0,
    penalty: Annotated[float, Field(ge=0)] = 1e-4,
    removed: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    edge_bits: EdgeBits = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(optimizer="adamw", lr=0.003),
) -> nn.Module:
    """Multiply channels, train quantized, remove the channels that a penalty has made small, and train on.

    In the manner of Widening and Squeezing, of which no code and few details are known. Channels are those between a
    batch norm and the layers that alone read it through ReLU, pooling and views; what residual sums add stays as wide
    as it is. Copies share the weights that read them, and get some noise. In the training, linear projections of the
    widened features are to give the float network's; later, magnitudes of the norms' weights are penalized. Then the
    channels with the smallest ones go, what they still add becomes part of the next norm, and the rest is trained on.

    Args:
        model: the float model.
        data: with training images, and the float network.
        bits: of the weights: signs for 1, else with a learned step for each output channel.
        activation_bits: of the inputs of the same layers; 1 takes signs, and ReLUs in front of them go; None leaves
            them in float.
        factor: copies of each channel.
        matching: weight of the squared distance to the float network's features, relative to their mean square.
        penalty: weight of the sum of magnitudes; 0 removes nothing, and trains once.
        removed: share of the widened channels that go; each norm keeps as many as it had, divided by the factor.
        edge_bits: of the first and the last layer; None means like all others, 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the whole training; three fifths of it come before channels are removed.

    Raises:
        Unsupported: there are no such channels, or no float network; signs are asked for, and an input is never
            negative.
    """
    example = data.example
    model.eval()
    if activation_bits == 1:
        drop_rectifiers(model, example, one_bit_layers(model, example, edge_bits, skip))
    chosen = {name for name, _, width in select_layers(model, bits, edge_bits, skip) if width == bits}
    groups = [channels for channels in selectable(model, example) if channels.layer in chosen]
    if not groups:
        raise Unsupported("no batch norm is read by convolutions alone: there are no channels to multiply or remove")
    widths = {channels.norm: len(_gate(model, channels)) for channels in groups}
    for channels in groups if factor > 1 else []:
        _widen(model, channels, factor, data.seed)
    objective = _Objective(data, groups, matching, penalty)
    if matching:
        add_projections(model, widths, factor)

    def inputs(width: int) -> nn.Module:
        return BinaryInput("approx") if width == 1 else LearnedInput(width)

    def train(stage: Data, part: Schedule, minimised: Objective | None) -> nn.Module:
        return train_quantized(
            model,
            stage,
            part,
            weight_of_bits,
            inputs,
            name="widen_squeeze",
            bits=bits,
            activation_bits=activation_bits,
            edge_bits=edge_bits,
            skip=skip,
            objective=minimised,
        )

    if not penalty:
        train(data, schedule, objective if matching else None)
        drop_projections(model)
        return model
    records: list[dict[str, Any]] = []
    first, second = (_stage(data, records, start) for start in (0.0, _SQUEEZED))
    images = next(iter(data.calibration))
    attach(model, images, weight_of_bits, inputs, bits, activation_bits, edge_bits=edge_bits, skip=skip)
    part = _part(schedule, data, _SQUEEZED)
    fit(model, first, part, objective=objective, groups=quantizer_groups(part), on_step=objective.see)
    drop_projections(model)
    left = _squeeze(model, example, groups, removed, {norm: width / factor for norm, width in widths.items()})
    train(second, _part(schedule, data, 1 - _SQUEEZED), None)
    data.record("training", joined(records))
    data.record("channels", {norm: {"float": widths[norm], "kept": kept} for norm, kept in left.items()})
    return model


class _Objective:
    """The task's loss, how far features are from the float network's, and later the magnitudes of the gates."""

    def __init__(self, data: Data, groups: list[Channels], matching: float, penalty: float) -> None:
        if matching and data.reference is None:
            raise Unsupported("there is no float network whose features could be matched")
        self.data, self.groups, self.matching, self.penalty = data, groups, matching, penalty
        self.penalized = False

    def __call__(self, network: nn.Module, x: Tensor, y: Any) -> Tensor:
        names = [channels.norm for channels in self.groups] if self.matching else []
        with features(network, names) as own:
            loss = self.data.loss(network(x), y)
        if self.matching:
            assert self.data.reference is not None
            with torch.no_grad(), features(self.data.reference, names) as wanted:
                self.data.reference(x)
            loss = loss + self.matching * distance(network, own, wanted)
        if self.penalized:
            gates = [_gate(network, channels).abs().sum() for channels in self.groups]
            loss = loss + self.penalty * torch.stack(gates).sum()
        return loss

    def see(self, step: Step) -> None:
        keep_positive(step.model)
        self.penalized = step.done >= _PENALIZED


def _gate(model: nn.Module, channels: Channels) -> Tensor:
    """What each channel is multiplied with."""
    gate = model.get_submodule(channels.norm).weight
    assert isinstance(gate, Tensor)
    return gate


def _widen(model: nn.Module, channels: Channels, factor: int, seed: int) -> None:
    """Copy the channels; noise makes copies differ, which else they would never do."""
    count = len(_gate(model, channels))
    select(model, channels, list(range(count)) * factor)
    copies = model.get_submodule(channels.layer).get_parameter("weight").detach()[count:]
    noise = torch.randn(copies.shape, generator=torch.Generator().manual_seed(seed)).to(copies)
    copies += _NOISE * copies.square().mean().sqrt() * noise


def _squeeze(
    model: nn.Module, example: Tensor, groups: list[Channels], removed: float, least: dict[str, float]
) -> dict[str, int]:
    """Take the quantizers off, and remove the channels with the smallest gates; how many each norm keeps."""
    gates = {channels: _gate(model, channels).detach().abs() for channels in groups}
    limit = torch.cat(list(gates.values())).quantile(removed)
    kept = {}
    for channels, gate in gates.items():
        count = max(int((gate >= limit).sum()), math.ceil(least[channels.norm]))
        kept[channels] = gate.topk(count).indices.sort().values.tolist()
    shifts = constants(model.eval(), kept, example)
    detach(model)
    add_constants(model, shifts, example)
    for channels, index in kept.items():
        select(model, channels, index)
    return {channels.norm: len(index) for channels, index in kept.items()}


def _stage(data: Data, records: list[dict[str, Any]], start: float) -> Data:
    """The data as one of several trainings sees it: its record is one of `records`."""
    stage = copy.copy(data)
    length = 1 - _SQUEEZED if start else _SQUEEZED
    stage.progress = lambda done: data.progress(start + length * done)
    stage.record = lambda name, values: records.append(values) if name == "training" else data.record(name, values)
    return stage


def _part(schedule: Schedule, data: Data, share: float) -> Schedule:
    """The same for a share of the time."""
    total = schedule.total(steps_per_epoch(data.train, schedule.batch_size))
    if total is None:
        return schedule.model_copy(update={"seconds": share * (schedule.seconds or 0)})
    return schedule.model_copy(update={"steps": max(1, round(share * total))})
