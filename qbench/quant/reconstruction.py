"""Reconstruction: a layer or block learns to answer as in the float network; one optimizer for all such methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.fakequant import deploy
from qbench.quant.layers import weight_of
from qbench.quant.schedule import cosine
from qbench.quant.soft_rounding import SoftRounding, temperature
from qbench.quant.sweep import Stop

Groups = list[dict[str, Any]]
"""Parameter groups of Adam; the learning rate of those with `cosine` falls to 0 along half a cosine."""
_ENOUGH = 14 * 14  # positions of an image
_TRAVEL = 20.0  # 20,000 steps of 0.001, as the papers have it: how far a rounding variable can go


def minimise(
    loss: Callable[[], Tensor],
    groups: Groups,
    *,
    steps: int,
    roundings: Iterable[SoftRounding] = (),
    rounding_weight: float = 0.01,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Adam on the loss, plus the penalty that decides the roundings.

    Args:
        loss: a scalar to minimise, called once per step.
        groups: parameters with their own `lr`; the roundings' variables are added with the learning rate 20 / steps,
            so that they can go as far in few steps as in the papers' 20,000.
        steps: how many.
        roundings: what is to be decided.
        rounding_weight: of their penalty, relative to the loss.
        after: called after each step, to keep parameters in bounds.
    """
    deciding = list(roundings)
    if deciding:
        groups = [*groups, {"params": [r.alpha for r in deciding], "lr": _TRAVEL / steps}]
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        return
    optimizer = torch.optim.Adam(groups)
    factors = [(lambda n: cosine(n, steps, 0)) if group.get("cosine") else (lambda _: 1.0) for group in groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    with torch.enable_grad():
        for step in range(steps):
            total = loss()
            beta = temperature(step, steps)
            if beta is not None:
                total = total + sum(rounding_weight * rounding.penalty(beta) for rounding in deciding)
            # Only of what is learned: the layers' other parameters get no gradients.
            gradients = torch.autograd.grad(total, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                after()


@dataclass(frozen=True)
class Cache:
    """A unit's inputs, and what it answered in the float network; (n, ...) each."""

    inputs: Tensor
    targets: Tensor
    floats: Tensor | None = None
    """Its inputs in the float network, where they are wanted."""

    @staticmethod
    def gather(stop: Stop, *, floats: bool = False) -> Cache:
        """Of all images at a stop.

        Args:
            stop: at the unit.
            floats: keep the inputs in the float network, too.

        Raises:
            Unsupported: the unit does not return one tensor.
        """
        with torch.no_grad():
            # Copies, because a block may change its input in place.
            targets = [stop.reference_layer(x.clone()) for x in stop.reference_inputs]
            if not all(isinstance(target, Tensor) for target in targets):
                raise Unsupported(f"{stop.name} does not return one tensor")
            own = torch.cat(list(stop.inputs))
            return Cache(own, torch.cat(targets), torch.cat(list(stop.reference_inputs)) if floats else None)

    def error(self, unit: nn.Module, batch_size: int = 32) -> float:
        """`||answer - target||^2 / ||target||^2` over all images."""
        parts = zip(self.inputs.split(batch_size), self.targets.split(batch_size), strict=True)
        with torch.no_grad():
            apart = sum(float((unit(x.clone()) - t).double().square().sum()) for x, t in parts)
        return apart / max(float(self.targets.double().square().sum()), 1e-30)

    def affordable(self, size: int) -> int:
        """How many images, at most `size`, have no more positions to learn from than `size` images of 14 x 14.

        Early in a network an image has thousands of positions for a few dozen weights: fewer images say as much there.
        """
        here, there = (x[0].numel() / _channels(x) for x in (self.inputs, self.targets))
        return max(1, min(size, round(size * _ENOUGH / max(1.0, math.sqrt(here * there)))))

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Indices of random minibatches, for ever."""
        while True:
            order = torch.randperm(len(self.inputs), generator=generator, device=generator.device)
            yield from order.to(self.inputs.device).split(min(size, len(order)))


def float_weight(name: str, layer: nn.Module, reference: nn.Module) -> Tensor:
    """The weight that a layer has in the float network, in float32.

    Raises:
        Unsupported: it has another shape there.
    """
    weight = weight_of(reference)
    if weight.shape != layer.weight.shape:
        raise Unsupported(f"{name} has another shape in the float network: a step before changed the structure")
    return weight


def distance(answer: Tensor, target: Tensor) -> Tensor:
    """Squared error, summed over channels, in the mean over images and positions."""
    return (answer - target).square().sum() * (_channels(target) / target.numel())


def _channels(x: Tensor) -> int:
    """Of images (B, C, H, W), tokens (B, T, C) or rows (B, C)."""
    return x.shape[-1] if x.dim() == 3 else x.shape[1]


def reconstruct(
    stop: Stop, start: Callable[[], None], learn: Callable[[Cache], None], cache: Cache | None = None
) -> tuple[float, float]:
    """Learn a unit, and keep what was learned if it is nearer to the float network than the start.

    Args:
        stop: at the unit.
        start: puts the encodings and quantizers of the start on the unit; called again if learning made it worse.
        learn: attaches quantizers that learn, and trains them.
        cache: of the stop, if it is there already.

    Returns:
        the relative squared error of the start, and that of what is kept.
    """
    cache = cache or Cache.gather(stop)
    start()
    before = cache.error(stop.layer)
    learn(cache)
    deploy(stop.layer)
    after = cache.error(stop.layer)
    if after <= before:
        return before, after
    start()
    return before, before
