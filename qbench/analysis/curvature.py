"""How the outputs' loss curves in the weights of each layer: traces of the Hessian, diagonals of the Fisher matrix.

Both need no labels. The loss is the Kullback-Leibler divergence of the network's predictions from those it makes with
its own weights: it is 0 there, and its Hessian is the Fisher matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qbench.errors import Unsupported

_BLOCK = 10  # probes for each forward pass, between two looks at how sure the traces are


@dataclass(frozen=True)
class Traces:
    """Estimates of the traces of the Hessian's diagonal blocks."""

    mean: dict[str, float]
    """By layer."""
    standard_error: dict[str, float]
    probes: int


def logits(outputs: object) -> Tensor:
    """The outputs of a classifier, (B, classes).

    Raises:
        Unsupported: they are something else.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        raise Unsupported("its outputs are not class scores (B, classes): measure sqnr is the one that needs none")
    return outputs


def divergence(outputs: object, reference: object) -> Tensor:
    """The Kullback-Leibler divergence of predictions from those of the reference, mean over images, in nats."""
    now, wanted = (logits(scores).double().log_softmax(1) for scores in (outputs, reference))
    return F.kl_div(now, wanted, reduction="batchmean", log_target=True)


def hessian_traces(
    network: nn.Module,
    names: Sequence[str],
    batches: Iterable[Tensor],
    *,
    probes: int = 100,
    tolerance: float = 0.05,
    seed: int = 0,
) -> Traces:
    """Hutchinson's estimate of the trace of each layer's block of the Hessian, as HAWQ-V2 (arXiv:1911.03852) takes it.

    A probe v of random signs is drawn for all layers at once; the part of v * (H v) that belongs to a layer sums to its
    trace in the mean, because what the other layers add to it has the mean 0.

    Args:
        network: in evaluation mode; not changed.
        names: its layers.
        batches: images; walked several times.
        probes: at most.
        tolerance: enough when the standard error of every trace is no more than this part of it.
        seed: of the probes.
    """
    with _differentiable(network, names) as (twin, weights):
        generator = torch.Generator().manual_seed(seed)
        samples = torch.empty(0, len(names), dtype=torch.float64)
        while len(samples) < probes:
            block = [
                [_signs(weight, generator) for weight in weights] for _ in range(min(_BLOCK, probes - len(samples)))
            ]
            samples = torch.cat([samples, _forms(twin, weights, batches, block)])
            mean, error = samples.mean(0), samples.std(0) / len(samples) ** 0.5
            if bool((error <= tolerance * mean.abs()).all()):
                break
    return Traces(
        dict(zip(names, mean.tolist(), strict=True)), dict(zip(names, error.tolist(), strict=True)), len(samples)
    )


def fisher_diagonals(
    network: nn.Module, names: Sequence[str], batches: Iterable[Tensor], *, seed: int = 0
) -> dict[str, Tensor]:
    """The mean over images of the squared gradient of each weight, for a class drawn from the network's own prediction.

    Args:
        network: in evaluation mode; not changed.
        names: its layers.
        batches: images; one backward pass for each.
        seed: of the classes.

    Returns:
        a tensor of the weight's shape by layer.
    """
    generator = torch.Generator().manual_seed(seed)
    images = 0
    with _differentiable(network, names) as (twin, weights):
        sums = [torch.zeros_like(weight) for weight in weights]
        for image in (image for batch in batches for image in batch.split(1)):
            scores = logits(twin(image))
            drawn = torch.multinomial(scores.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
            gradients = _gradients(F.cross_entropy(scores, drawn.to(scores.device)), weights)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient.square()
            images += 1
    return {name: total / images for name, total in zip(names, sums, strict=True)}


@contextmanager
def _differentiable(network: nn.Module, names: Sequence[str]) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """A copy whose gradients are those of these layers' weights alone, and those weights."""
    twin = copy.deepcopy(network).requires_grad_(False)
    weights = [twin.get_submodule(name).get_parameter("weight").requires_grad_() for name in names]
    # Fused attention has no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield twin, weights


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2.0 - 1).to(like)


def _forms(network: nn.Module, weights: list[Tensor], batches: Iterable[Tensor], probes: list[list[Tensor]]) -> Tensor:
    """(probes, layers): the part of v'Hv that belongs to each layer."""
    sums = torch.zeros(len(probes), len(weights), dtype=torch.float64)
    images = 0
    for batch in batches:
        outputs = network(batch)
        slopes = _gradients(divergence(outputs, logits(outputs).detach()) * len(batch), weights, again=True)
        for number, probe in enumerate(probes):
            along = torch.stack([(s * v).sum() for s, v in zip(slopes, probe, strict=True)]).sum()
            products = torch.autograd.grad(along, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
            sums[number] += torch.stack([(v * p).sum() for v, p in zip(probe, products, strict=True)]).double().cpu()
        images += len(batch)
    return sums / images


def _gradients(value: Tensor, weights: list[Tensor], *, again: bool = False) -> tuple[Tensor, ...]:
    """Zero for weights that the value does not depend on; with `again`, they can be differentiated in their turn."""
    return torch.autograd.grad(value, weights, create_graph=again, allow_unused=True, materialize_grads=True)
