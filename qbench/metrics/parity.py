"""What a deployed network answers, beside the network that was scored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.metrics.ap import match
from qbench.metrics.base import Finished
from qbench.models.base import first_device
from qbench.registry import metric
from qbench.runtimes.base import Compiled, flatten, unflatten
from qbench.runtimes.choice import AUTO, Candidate, RuntimeChoice, candidates
from qbench.runtimes.integers import is_quantized
from qbench.runtimes.pair import distances, rows_of
from qbench.score import execute

_BATCH = 8
_COMPARED = 128
_FINEST = 2.0**-24  # float32 has no smaller relative difference


@metric("parity", unit="dB", direction="higher")
def parity(finished: Finished, *, runtime: RuntimeChoice = AUTO) -> dict[str, Any]:
    """Outcomes of the deployed network on all evaluation images, and how far its answers are from the scored one's.

    Two executions of a quantized network never agree entirely: sums that differ in their last digit round to different
    codes. `noise_db` is what that alone does: the scored network against itself, inputs changed by a millionth.

    Returns:
        `runtimes`: of each, counts of layers on integers and in all, layers in float with the reason, `sqnr_db`: 20
        log10 of the outputs' norm over that of the difference, for each of the first images, at most 144; for
        classification `flips`: images with another first guess. `noise_db`; `unable`: why other runtimes cannot.
        Kept with the run's outcomes: those of each runtime, as `<runtime>/<name>`.

    Args:
        finished: the run.
        runtime: that executes it; `auto` is each one that has integer kernels for it.

    Raises:
        Unsupported: nothing is quantized, or the network is not deployable as integers.
    """
    if not is_quantized(finished.quantized):
        raise Unsupported("nothing is quantized")
    scored, images = finished.quantized, finished.images
    size = min(_BATCH, len(images))
    able, unable = candidates(runtime, scored, images.batch(range(size)), finished.threads)
    forwards = {one.name: _forward(one.compiled, scored, images.batch(range(size))) for one in able}
    sqnr, noise = _compare(finished, forwards, size)
    outcomes = {name: execute(forward, finished.model, images, size) for name, forward in forwards.items()}
    return {
        "images": len(images),
        "runtimes": {one.name: _facts(one, sqnr[one.name], outcomes[one.name], finished) for one in able},
        "noise_db": noise,
        "unable": unable,
        "outcomes": {
            f"{name}/{key}": array for name, own in outcomes.items() for key, array in _kept(own, finished).items()
        },
    }


@torch.no_grad()
def _forward(compiled: Compiled, scored: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    """The compiled network, whose batches have a fixed size, as a function that returns what the network does."""
    template, size = scored(example.to(first_device(scored))), len(example)

    def forward(x: Tensor) -> Any:
        filled = torch.cat([x, x[-1:].expand(size - len(x), -1, -1, -1)])
        outputs = compiled.run(np.ascontiguousarray(filled.numpy()))
        return unflatten(template, (torch.from_numpy(output[: len(x)]) for output in outputs))

    return forward


@torch.no_grad()
def _compare(
    finished: Finished, forwards: dict[str, Callable[[Tensor], Any]], size: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Of each of the first images: the decibels of every runtime, and those of rounding alone."""
    scored, images = finished.quantized, finished.images
    device = first_device(scored)
    found: dict[str, list[float]] = {name: [] for name in forwards}
    noise: list[float] = []
    for start in range(0, min(len(images), _COMPARED), size):
        batch = images.batch(range(start, min(start + size, len(images))))
        wanted = _answers(scored(batch.to(device)))
        noise += _decibels(_answers(scored(batch.to(device) * (1 + 1e-6))), wanted)
        for name, forward in forwards.items():
            found[name] += _decibels(_answers(forward(batch)), wanted)
    return found, noise


def _answers(outputs: Any) -> np.ndarray:
    return rows_of([tensor.cpu().numpy() for tensor in flatten(outputs)])


def _decibels(found: np.ndarray, wanted: np.ndarray) -> list[float]:
    return [-20 * math.log10(max(distance, _FINEST)) for distance in distances(found, wanted)]


def _facts(one: Candidate, sqnr: list[float], outcomes: dict[str, np.ndarray], finished: Finished) -> dict[str, Any]:
    compiled = one.compiled
    facts = {
        "integer_layers": compiled.integer_layers,
        "compute_layers": compiled.compute_layers,
        "claimed_layers": len(compiled.claimed_layers),
        "float_layers": dict(compiled.float_layers),
        "sqnr_db": sqnr,
    }
    if finished.model.task == "classification":
        facts["flips"] = int((outcomes["prediction"] != finished.outcomes["prediction"]).sum())
    return facts


def _kept(outcomes: dict[str, np.ndarray], finished: Finished) -> dict[str, np.ndarray]:
    """What is judged: for detection, the matches."""
    if finished.model.task == "detection":
        return match(outcomes, finished.images.split.targets, len(finished.dataset.classes)).to_arrays() | outcomes
    return {name: outcomes[name] for name in ("prediction", "correct", "top5")}
