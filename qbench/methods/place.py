"""Quantization for a piece of hardware: grids and edges as its profile has them."""

from __future__ import annotations

import copy
from typing import Annotated, Any

from pydantic import AfterValidator
from torch import nn

from qbench import profiles, registry
from qbench.data import Data
from qbench.errors import UserError
from qbench.methods.activations import activations
from qbench.methods.fold_bn import fold_bn
from qbench.methods.mixed import Rounding
from qbench.registry import Bits, File, method

ProfileName = Annotated[str, File(profiles.path_of), AfterValidator(lambda name: profiles.load(name) and name)]
"""Option type: a profile, by its name or the path of its file."""


@method("place")
def place(
    model: nn.Module,
    data: Data,
    *,
    profile: ProfileName = "inputs",
    method: Rounding = "rtn",
    bits: Bits | None = None,
    activation_bits: Bits | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Quantize weights and activations as a profile of hardware says: fold, round, and quantize its edges.

    Profiles are `inputs`, `every_edge`, `weight_only`, `academic`, `fbgemm`, `tensorrt`, `power_of_two`, or a file.

    Args:
        model: changed in place.
        data: its calibration images, and its float network.
        profile: which grids and edges the hardware has.
        method: how weights are rounded; its granularity, symmetry and scales are the profile's.
        bits: of the weights; None is the profile's first.
        activation_bits: of the inputs; None is the profile's first.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        UserError: the profile does not have that width, or the method lacks an option that the profile needs.
        Unsupported: sums that cannot be taken out of their function.
    """
    wanted = profiles.load(profile)
    if wanted.fold_bn:
        if data.reference is not None:
            # What later steps compare layers with must be folded, too; the run's own reference stays.
            folded = fold_bn(copy.deepcopy(data.reference), data)
            data = copy.copy(data)
            data.reference = folded
        model = fold_bn(model, data)
    common = {"edge_bits": wanted.edge_bits, "skip": list(skip)}
    grid: dict[str, Any] = {"granularity": wanted.weights.granularity, "symmetric": wanted.weights.symmetric}
    grid |= {"power_of_two": True} if wanted.weights.power_of_two else {}
    rounding = registry.resolve("method", *registry.parse(method))
    width = _width(profile, "bits", bits, wanted.weights.bits)
    model = rounding.with_options(bits=width, **grid, **common)(model, data)
    inputs = wanted.inputs
    if inputs is None:
        if activation_bits is not None:
            raise UserError(f"place: profile {profile} leaves activations in float; leave activation_bits out")
        return model
    return activations(
        model,
        data,
        bits=_width(profile, "activation_bits", activation_bits, inputs.bits),
        symmetric=inputs.symmetric,
        power_of_two=inputs.power_of_two,
        placement=inputs.placement,
        edge_bits=wanted.edge_bits,
        skip=skip,
    )


def _width(profile: str, option: str, asked: int | None, known: list[int]) -> int:
    if asked is not None and asked not in known:
        raise UserError(f"place: {option}={asked}, but profile {profile} has {', '.join(map(str, known))}")
    return known[0] if asked is None else asked
