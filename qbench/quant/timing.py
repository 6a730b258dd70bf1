"""Training steps timed against steps of the float network, interleaved on the same batches."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Stepper = Callable[[Tensor, Any], float]
"""`(images, targets) -> loss`: one whole training step."""
_WARMUP = 3


class Pairs:
    """The first steps of a training, each also done on a copy of the float network, whose result is thrown away.

    The first few pairs warm up; the very first measures what autograd keeps for the backward pass. Who goes first
    alternates.
    """

    def __init__(
        self, reference: nn.Module | None, prepare: Callable[[nn.Module], Stepper], total: int, timed: int
    ) -> None:
        self.warmup = min(_WARMUP, total // 4)
        self.last = min(total, self.warmup + timed)
        self.quantized: list[float] = []
        self.float: list[float] = []
        self.saved: dict[str, int] = {}
        self.networks: list[nn.Module] = []
        self._stepper: Stepper | None = None
        if reference is not None and timed:
            self.networks = [copy.deepcopy(reference).requires_grad_().train()]
            self._stepper = prepare(self.networks[0])

    def step(self, number: int, quantized: Stepper, x: Tensor, y: Any) -> tuple[float, float]:
        """Do the step: its loss and seconds."""
        if number >= self.last:
            self._stepper, self.networks = None, []
        if self._stepper is None:
            return _timed(quantized, x, y)
        if number == 0:
            loss, spent, self.saved["quantized"] = _measured(quantized, x, y)
            _, _, self.saved["float"] = self._apart(_measured, x, y)
            return loss, spent
        first = self._apart(_timed, x, y) if number % 2 else None
        loss, spent = _timed(quantized, x, y)
        _, reference = first or self._apart(_timed, x, y)
        if number >= self.warmup:
            self.quantized.append(spent)
            self.float.append(reference)
        return loss, spent

    def record(self) -> dict[str, Any]:
        """Paired seconds per step, and the bytes that autograd keeps for the backward pass; empty if none were done."""
        if not self.quantized:
            return {}
        return {"quantized": self.quantized, "float": self.float, "saved_bytes": self.saved}

    def state_dict(self) -> dict[str, Any]:
        return {"quantized": self.quantized, "float": self.float, "saved": self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.quantized, self.float, self.saved = state["quantized"], state["float"], state["saved"]

    def _apart(self, run: Callable[..., Any], x: Tensor, y: Any) -> Any:
        """On the float copy, without touching the random numbers of the training."""
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            return run(self._stepper, x, y)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(step: Stepper, x: Tensor, y: Any) -> tuple[float, float]:
    synchronize(x.device)
    start = time.perf_counter()
    loss = step(x, y)
    synchronize(x.device)
    return loss, time.perf_counter() - start


def _measured(step: Stepper, x: Tensor, y: Any) -> tuple[float, float, int]:
    """With the bytes of all storages that autograd keeps."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, spent = _timed(step, x, y)
    return loss, spent, sum(kept.values())
