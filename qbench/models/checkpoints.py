"""Weights from safetensors files, and fitting them to an architecture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qbench.errors import UserError

_BACKBONES = ("backbone.body.", "backbone.")
"""In front of the names of a detector's backbone."""


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file, looked for as given, then in the folder that QBENCH_WEIGHTS names."""

    path: str

    def __str__(self) -> str:
        return f"checkpoint {self.path}"

    def find(self) -> Path:
        """
        Raises:
            UserError: the file is in neither place.
        """
        folder = os.environ.get("QBENCH_WEIGHTS")
        places = [Path(self.path), *([Path(folder) / self.path] if folder else [])]
        for place in places:
            if place.is_file():
                return place
        looked = " and ".join(str(place) for place in places)
        hint = "" if folder else "; set QBENCH_WEIGHTS to the folder that holds it"
        raise UserError(f"checkpoint {self.path!r} not found: looked for {looked}{hint}")

    def fingerprint(self) -> str:
        with self.find().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def load(self) -> Mapping[str, Tensor]:
        path = self.find()
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a complete safetensors file ({error}); fetch it again") from error


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str = "the checkpoint") -> None:
    """Load the state dict, strictly; of a tensor that has several names, one suffices.

    Raises:
        UserError: keys are missing, unexpected, or of another shape; the message names them.
    """
    own = module.state_dict()
    present = {_memory(own[key]) for key in own.keys() & state.keys()}
    # Counters that only matter when training goes on: checkpoints converted from other frameworks lack them.
    missing = [
        key
        for key, value in own.items()
        if key not in state and not key.endswith("num_batches_tracked") and _memory(value) not in present
    ]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{title}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if keys
    ]
    if problems:
        raise UserError(f"{source} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(dict(state), strict=False)


def start_from(module: nn.Module, state: Mapping[str, Tensor], source: str = "the checkpoint") -> list[str]:
    """Load what has the name and shape of something in the module: all but new heads, or a backbone alone.

    Args:
        module: changed in place.
        state: with the module's own names, or those of its backbone.
        source: where the state is from, for messages.

    Returns:
        The names of tensors that stay as they are.

    Raises:
        UserError: nothing fits.
    """
    own = distinct(module.state_dict())
    taken = {key: state[name] for key, value in own.items() if (name := _counterpart(key, value, state)) is not None}
    if not taken:
        raise UserError(f"nothing of {source} has the name and shape of something in {type(module).__name__}")
    module.load_state_dict(taken, strict=False)
    return [key for key in own if key not in taken]


def _counterpart(key: str, value: Tensor, state: Mapping[str, Tensor]) -> str | None:
    names = [key, *(key.removeprefix(prefix) for prefix in _BACKBONES if key.startswith(prefix))]
    return next((name for name in names if name in state and state[name].shape == value.shape), None)


def _memory(tensor: Tensor) -> tuple[int, int, torch.Size]:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.shape


def distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without further names of tensors that are there already: what a safetensors file can hold."""
    first: dict[tuple[int, int, torch.Size], str] = {}
    for key, value in state.items():
        if value.numel():
            first.setdefault(_memory(value), key)
    return {key: value for key, value in state.items() if not value.numel() or first[_memory(value)] == key}
