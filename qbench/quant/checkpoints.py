"""The state of a training on disk: a training that was killed goes on from there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from qbench.errors import UserError
from qbench.store import write_atomically


class Checkpoints:
    """Those of one method in one run: one file for each time that it trains.

    Attributes:
        seconds: of training that earlier processes have done.
    """

    def __init__(self, folder: Path, every: float | None = None) -> None:
        """
        Args:
            folder: of the files, made when it is needed.
            every: seconds from one to the next; None is what QBENCH_CHECKPOINT_SECONDS says.

        Raises:
            UserError: QBENCH_CHECKPOINT_SECONDS is not a number.
        """
        self.folder, self.every = folder, interval() if every is None else every
        self.trainings, self.seconds = 0, 0.0

    def next(self) -> Checkpoint:
        """Of the training that begins now."""
        self.trainings += 1
        return Checkpoint(self.folder / f"{self.trainings}.pt", self.every)


class Checkpoint:
    """One file, written whole or not at all."""

    def __init__(self, path: Path, every: float) -> None:
        self.path, self.every = path, every
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state, on the CPU; None if there is none."""
        if not self.path.is_file():
            return None
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        return state

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= self.every

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state: tensors, numbers, texts, and lists and dicts of them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda partial: torch.save(state, partial))
        self._saved = time.monotonic()


def interval() -> float:
    """Seconds from one checkpoint to the next: QBENCH_CHECKPOINT_SECONDS, by default 60.

    Raises:
        UserError: the variable is not a number.
    """
    text = os.environ.get("QBENCH_CHECKPOINT_SECONDS", "60")
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"QBENCH_CHECKPOINT_SECONDS={text!r} is not a number of seconds; set it to 60, for example"
        ) from None
