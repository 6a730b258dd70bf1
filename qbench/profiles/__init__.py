"""What a piece of hardware can execute, as a file: which widths and grids it has, and which edges it quantizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qbench.errors import UserError
from qbench.registry import Loader, nearest

Width = Annotated[int, Field(ge=1, le=16)]
_FINENESS = ("tensor", "channel", "group")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Weights(_Strict):
    """Uniform grids of weights."""

    bits: Annotated[list[Width], Field(min_length=1)]
    """Widths there are kernels for; the first is taken where none is asked for."""
    granularity: Literal["tensor", "channel", "group"]
    """The finest there are kernels for."""
    symmetric: bool
    """Zero points must be 0."""
    power_of_two: bool
    """Scales must be powers of two."""


class Inputs(_Strict):
    """Uniform grids of activations, with static ranges, one for each tensor."""

    bits: Annotated[list[Width], Field(min_length=1)]
    symmetric: bool
    power_of_two: bool
    placement: Literal["inputs", "every_edge"]
    """What is quantized: the inputs of layers, or also what sums, products, concatenations and pools read."""


class Profile(_Strict):
    """What an artifact must be for this hardware."""

    description: str
    source: str
    weights: Weights
    inputs: Inputs | None
    """None: activations are floats."""
    edge_bits: Width | Literal[32] | None
    """Another width that the first and the last layer have; 32 is float."""
    fold_bn: bool
    """There are no batch norms: those behind layers must be folded."""


def names() -> list[str]:
    """Of the profiles that come with qbench."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def path_of(name: str) -> Path:
    """The file of a profile: one of qbench's by its name, or any by its path, which ends in `.yaml`.

    Raises:
        UserError: there is none.
    """
    path = Path(name) if name.endswith(".yaml") else Path(__file__).with_name(f"{name}.yaml")
    if not path.is_file():
        known = ", ".join(names())
        raise UserError(f"unknown profile {name!r}{nearest(name, names())}; profiles are {known}, or a .yaml file")
    return path


def load(name: str) -> Profile:
    """Read a profile strictly.

    Raises:
        UserError: it is unknown, or something in it is wrong.
    """
    path = path_of(name)
    try:
        return Profile.model_validate(yaml.load(path.read_text(encoding="utf-8"), Loader))
    except yaml.YAMLError as error:
        raise UserError(f"profile {path}: not valid YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"profile {path}: {place}: {first['msg'][0].lower() + first['msg'][1:]}") from None


def violations(profile: Profile, facts: Mapping[str, Any]) -> list[str]:
    """Why hardware of this profile cannot execute a network; nothing where it can.

    Args:
        profile: of the hardware.
        facts: as the metric `placement` returns them.
    """
    layers: dict[str, Any] = facts["layers"]
    ends = {next(iter(layers)), next(reversed(layers))} if layers else set()
    found: Counter[str] = Counter()
    for name, layer in layers.items():
        widths = [profile.edge_bits] if name in ends and profile.edge_bits is not None else []
        found.update(_weight(profile.weights, layer["weight"], widths))
        found.update(_input(profile.inputs, layer["input"], widths))
    reasons = [f"{reason} ({count} of {len(layers)} layers)" for reason, count in found.items()]
    return [*reasons, *_edges(profile.inputs, facts), *_norms(profile, facts)]


def _weight(profile: Weights, weight: Mapping[str, Any] | None, others: list[int]) -> Iterator[str]:
    if weight is None:
        if 32 not in others:
            yield "float weights"
        return
    if weight["kind"] != "Affine":
        yield f"weights on no uniform grid, but {weight['kind']}"
        return
    if weight["bits"] not in [*profile.bits, *others]:
        yield f"weights of {weight['bits']} bits"
    if _FINENESS.index(weight["granularity"]) > _FINENESS.index(profile.granularity):
        yield f"weights with a scale per {weight['granularity']}"
    if profile.symmetric and not weight["symmetric"]:
        yield "weights with zero points"
    if profile.power_of_two and not weight["power_of_two"]:
        yield "weights whose scales are no powers of two"


def _input(profile: Inputs | None, read: Mapping[str, Any] | None, others: list[int]) -> Iterator[str]:
    if profile is None or read is None:
        if (profile is None) != (read is None) and not (read is None and 32 in others):
            yield "float inputs" if read is None else "quantized inputs"
        return
    if read["kind"] != "static":
        yield f"{read['kind']} input quantizers"
        return
    if read["bits"] not in [*profile.bits, *others]:
        yield f"inputs of {read['bits']} bits"
    if profile.symmetric and not read["symmetric"]:
        yield "inputs with zero points"
    if profile.power_of_two and not read["power_of_two"]:
        yield "inputs whose scales are no powers of two"


def _edges(profile: Inputs | None, facts: Mapping[str, Any]) -> list[str]:
    if profile is None or profile.placement == "inputs":
        count = len(facts["edges"])
        return [f"{count} operands of sums, joins or pools are quantized"] if count else []
    if facts["float_edges"] is None:
        return [f"it is not known which sums and joins read floats: {facts['reason']}"]
    missing = facts["float_edges"]
    reasons = Counter(reason for edge in facts["edges"].values() for reason in _input(profile, edge, []))
    lines = [f"{reason} of sums, joins or pools ({count})" for reason, count in reasons.items()]
    return [f"{missing} operands of sums, joins or pools are float", *lines] if missing else lines


def _norms(profile: Profile, facts: Mapping[str, Any]) -> list[str]:
    count = facts["norms"]
    return [f"{count} batch norms are not folded"] if profile.fold_bn and count else []
