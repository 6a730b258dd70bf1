"""Any model of timm, with its own preprocessing."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.models.base import Model, Preprocess, Weights
from qbench.models.checkpoints import Checkpoint
from qbench.registry import model, nearest

Side = Annotated[int, Field(ge=1)]
Mode = Literal["crop", "squash", "letterbox"]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
_MODES: dict[str, Mode] = {"center": "crop", "squash": "squash", "border": "letterbox"}


@model("timm")
def timm_model(
    *,
    name: str,
    pretrained: bool = False,
    checkpoint: str | None = None,
    random: Annotated[int, Field(ge=0)] | None = None,
    args: dict[str, Any] | None = None,
    size: Side | None = None,
    resize: Annotated[int, Field(ge=0)] | None = None,
    interpolation: Interpolation | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    mode: Mode | None = None,
) -> Model:
    """A classifier of timm; preprocessing is the model's own unless it is given.

    Args:
        name: as `timm.list_models` has it.
        pretrained: download timm's weights, or take them from the Hugging Face cache.
        checkpoint: safetensors file, looked for as given, then in the folder that QBENCH_WEIGHTS names.
        random: seed of random weights, for trying out speed and export.
        args: more arguments of `timm.create_model`.
        size: side of the network's square input.
        resize: side before the crop; 0 crops without resizing.
        interpolation: filter of the resizing.
        mean: of each channel of images in [0, 1].
        std: of each channel of images in [0, 1].
        mode: how images of another shape are fitted in.
    """
    import timm

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{nearest(name, timm.list_models())} (timm {timm.__version__})")
    given = {
        "size": size,
        "resize": resize,
        "mode": mode,
        "interpolation": interpolation,
        "mean": mean and tuple(mean),
        "std": std and tuple(std),
    }
    build = functools.partial(_create, name, args or {})
    weights = _weights(name, args or {}, pretrained, checkpoint, random)
    return Model("classification", build, weights, _preprocess(name, args or {}, given), name=name)


def _create(name: str, args: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except (TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"timm cannot build {name!r} with args {dict(args)}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _weights(
    name: str, args: Mapping[str, Any], pretrained: bool, checkpoint: str | None, random: int | None
) -> Weights:
    if pretrained + (checkpoint is not None) + (random is not None) != 1:
        raise UserError(
            f"model timm {name!r} needs its weights: give one of pretrained: true, checkpoint: <file.safetensors>, "
            "or random: <seed>"
        )
    if checkpoint is not None:
        return Checkpoint(checkpoint)
    return (
        Random(functools.partial(_create, name, args), random) if random is not None else Pretrained(name, dict(args))
    )


@dataclass(frozen=True)
class Random:
    """The weights that a model is born with under a seed."""

    build: functools.partial[nn.Module]
    seed: int

    def fingerprint(self) -> str:
        return digest(self.load())

    def load(self) -> Mapping[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.build().state_dict()


@dataclass(frozen=True)
class Pretrained:
    """timm's own weights."""

    name: str
    args: dict[str, Any] = field(hash=False)

    def fingerprint(self) -> str:
        return self._loaded[1]

    def load(self) -> Mapping[str, Tensor]:
        return self._loaded[0]

    @functools.cached_property
    def _loaded(self) -> tuple[Mapping[str, Tensor], str]:
        try:
            state = _create(self.name, self.args, pretrained=True).state_dict()
        except UserError:
            raise
        except Exception as error:  # whatever the network and the hub's client raise
            raise UserError(
                f"the pretrained weights of timm {self.name!r} cannot be had ({type(error).__name__}: "
                f"{_line(error)[:160]}); connect to the network, or give checkpoint: <file.safetensors>"
            ) from error
        return state, digest(state)


def digest(state: Mapping[str, Tensor]) -> str:
    """Hash of a state dict: names, shapes, types and values."""
    total = hashlib.sha256()
    for key, value in sorted(state.items()):
        total.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def _preprocess(name: str, args: Mapping[str, Any], given: Mapping[str, Any]) -> Preprocess:
    import timm
    from timm.data import resolve_data_config

    described = timm.get_pretrained_cfg(name)
    own = resolve_data_config(
        {key: args[key] for key in ("in_chans", "img_size") if key in args},
        pretrained_cfg=described.to_dict() if described else {},
    )
    channels = args.get("in_chans", own["input_size"][0])
    size = (given["size"],) * 2 if given["size"] else tuple(own["input_size"][-2:])
    values = {
        "size": size,
        "resize": int(min(size) / own["crop_pct"]),  # timm cuts off rather than rounding
        "mode": _MODES.get(own["crop_mode"], own["crop_mode"]),
        "interpolation": own["interpolation"],
        "mean": _channels(own["mean"], channels),
        "std": _channels(own["std"], channels),
    }
    values |= {key: value for key, value in given.items() if value is not None and key != "size"}
    _check(name, values)
    return Preprocess(**values | {"resize": values["resize"] or None})


def _check(name: str, values: Mapping[str, Any]) -> None:
    head = f"model timm {name!r}"
    if values["interpolation"] not in get_args(Interpolation):
        choices = ", ".join(get_args(Interpolation))
        raise UserError(f"{head} wants the filter {values['interpolation']!r}; set interpolation to one of {choices}")
    if len(set(values["size"])) > 1 and values["mode"] == "crop":
        raise UserError(
            f"{head} wants an input of {values['size']} pixels, not a square; set mode: squash or letterbox"
        )
    if not len(values["mean"]) == len(values["std"]) in (1, 3):
        raise UserError(
            f"{head}: mean and std need a value for each channel, 1 or 3: {values['mean']}, {values['std']}"
        )


def _channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """timm's statistics are of RGB; a network of other channels sees their mean."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
