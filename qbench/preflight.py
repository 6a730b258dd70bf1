"""What is looked at before any run starts, so that wrong input stops the suite while nothing is written yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from qbench.errors import UserError
from qbench.run import Run
from qbench.workspace import Workspace


def check(runs: Iterable[Run], cache: Path, message: Callable[[str], None]) -> None:
    """Load every model once, and decode every calibration and evaluation image into the cache.

    Args:
        runs: that are about to start.
        cache: folder of what is kept between runs.
        message: told what is being prepared, what was mended in the annotations, and which images are skipped.

    Raises:
        UserError: weights are missing, damaged or do not fit, or an image cannot be read.
    """
    told: set[str] = set()
    cells = {(run.label.rsplit("/", 2)[0], run.manifest): run for run in runs}
    for (name, _), run in cells.items():
        message(f"preparing {name}")
        space = Workspace(run.dataset, run.model, run.calibration, cache, torch.device("cpu"))
        space.model.load()
        for note in space.dataset.notes:
            if note not in told:
                message(note)
                told.add(note)
        for split in ("calibration", "evaluation"):
            images = space.images(split)
            if len(images) == 0:
                raise UserError(f"dataset {run.dataset}: none of the {split} images can be read")
            for unreadable in images.unreadable:
                message(f"skipped: the {split} image {unreadable} cannot be read")
