"""Training a float checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from qbench.cache import cache_dir
from qbench.datasets.images import ImageArray
from qbench.devices import best_device
from qbench.errors import UserError
from qbench.metrics.map import coco_stats
from qbench.models.checkpoints import Checkpoint, distinct, start_from
from qbench.quant.checkpoints import Checkpoints
from qbench.quant.schedule import Schedule
from qbench.quant.training import fit
from qbench.registry import Reference
from qbench.run import engine
from qbench.score import score
from qbench.workspace import Workspace

FROM_SCRATCH = Schedule(epochs=100, lr=1e-3, optimizer="adamw", weight_decay=0.05, clip=1.0)


def train(
    model: Reference,
    dataset: Reference,
    out: Path,
    *,
    schedule: Schedule = FROM_SCRATCH,
    start: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """Train a model and write its weights, float32, to a safetensors file: whole, or not at all.

    The same call after the process was killed goes on from the last checkpoint.

    Args:
        model: what to train; its own checkpoint is not looked at.
        dataset: its training split is learned; its evaluation split is only scored in the end.
        out: the file; its metadata say how it was made and how good it is.
        schedule: of the training.
        start: checkpoint to start from, in place of random weights: of the model with other heads, or of its backbone.
        seed: of the initial weights, the order of the images, augmentation and dropout.
        threads: cores to use; None leaves torch's choice.
        progress: called with the fraction that is done.

    Returns:
        What the metadata say: `model`, `dataset`, `training` (all arguments; of `start`, what it is and which tensors
        were not taken from it) and `evaluation` (`images`, and `top1` as a share or the COCO numbers).

    Raises:
        UserError: the folder of `out` cannot be written, model and dataset are of different tasks, or nothing of
            `start` fits.
        FloatingPointError: the loss is not finite.
    """
    _writable(out)
    if threads:
        torch.set_num_threads(threads)
    device = best_device()
    # One calibration image is drawn because there is no calibration without any; nothing looks at it.
    space = Workspace(dataset, model, (1, seed), cache_dir(), device)
    if space.model.task != space.dataset.task:
        raise UserError(f"model {model} is for {space.model.task}, but dataset {dataset} is for {space.dataset.task}")
    torch.manual_seed(seed)
    network = space.model.build()
    how: dict[str, Any] = schedule.model_dump() | {"seed": seed}
    if start is not None:
        source = Checkpoint(start)
        new = start_from(network, source.load(), str(source))
        how["start"] = {"checkpoint": start, "sha256": source.fingerprint(), "new": new}
    identity = [str(model), str(dataset), space.dataset.fingerprint, how, engine()]
    kept = cache_dir() / "checkpoints" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    data = space.data(seed=seed, trains=True, progress=progress, checkpoints=Checkpoints(kept))
    network = fit(network.to(device), data, schedule)
    report = {
        "model": str(model),
        "dataset": str(dataset),
        "training": how,
        "evaluation": _evaluate(network, space),
    }
    _write(network, out, report)
    shutil.rmtree(kept, ignore_errors=True)
    return report


def _writable(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(out)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another place with -o") from error


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _evaluate(network: nn.Module, space: Workspace) -> dict[str, Any]:
    images: ImageArray = space.images("evaluation")
    outcomes, _ = score(network, space.model, images, device=space.device, threads=torch.get_num_threads())
    if space.model.task == "detection":
        quality: dict[str, Any] = coco_stats(images.split.targets, outcomes, len(space.dataset.classes))
    else:
        quality = {"top1": float(np.mean(outcomes["correct"]))}
    return {"images": len(images)} | quality


def _write(network: nn.Module, out: Path, report: dict[str, Any]) -> None:
    state = {
        name: (value.float() if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in distinct(network.state_dict()).items()
    }
    safetensors.torch.save_file(state, _partial(out), metadata={"qbench_training": json.dumps(report)})
    _partial(out).replace(out)
