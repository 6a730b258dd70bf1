"""How the outputs' loss curves in the weights of each layer: traces of the Hessian, diagonals of the Fisher matrix.

Both need no labels. The loss is the Kullback-Leibler divergence of the network's predictions from those it makes with
its own weights: it is 0 there, and its Hessian is the Fisher matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from qbench.errors import Unsupported
from qbench.quant import distillation
from qbench.quant.answers import are_class_scores

_BLOCK = 10  # probes for each forward pass, between two looks at how sure the traces are


@dataclass(frozen=True)
class Traces:
    """Estimates of the traces of the Hessian's diagonal blocks."""

    mean: dict[str, float]
    """By layer."""
    standard_error: dict[str, float]
    probes: dict[str, int]


def divergence(outputs: Any, reference: Any) -> Tensor:
    """The Kullback-Leibler divergence of predictions from those of the reference, mean over images, in nats.

    Of outputs that are no class scores, as those of a detector, the relative squared error. No gradients flow through
    the reference.
    """
    now, wanted = (tree_map(Tensor.double, answers) for answers in (outputs, reference))
    return distillation.divergence(now, tree_map(Tensor.detach, wanted), temperature=1.0)


def hessian_traces(
    network: nn.Module,
    names: Sequence[str],
    batches: Iterable[Tensor],
    *,
    probes: int = 50,
    tolerance: float = 0.1,
    seed: int = 0,
) -> Traces:
    """Hutchinson's estimate of the trace of each layer's block of the Hessian, as HAWQ-V2 (arXiv:1911.03852) takes it.

    The mean of v'Hv over probes v of random signs. Each layer has its own: a probe of all layers at once costs less,
    but what other layers add to v'Hv can be many times the trace of a layer that matters little.

    Args:
        network: in evaluation mode; not changed.
        names: its layers.
        batches: images; walked several times.
        probes: of each layer, at most.
        tolerance: a layer has had enough when the standard error of its trace is no more than this part of it.
        seed: of the probes.
    """
    samples: dict[str, Tensor] = {name: torch.empty(0, dtype=torch.float64) for name in names}
    with _differentiable(network, names) as (twin, weights):
        generator = torch.Generator().manual_seed(seed)
        unsure = dict(zip(names, weights, strict=True))
        for done in range(0, probes, _BLOCK):
            count = min(_BLOCK, probes - done)
            block = {name: [_signs(weight, generator) for _ in range(count)] for name, weight in unsure.items()}
            for name, forms in _forms(twin, unsure, batches, block).items():
                samples[name] = torch.cat([samples[name], forms])
                if _error(samples[name]) <= tolerance * float(samples[name].mean()):
                    del unsure[name]
            if not unsure:
                break
    return Traces(
        {name: float(forms.mean()) for name, forms in samples.items()},
        {name: _error(forms) for name, forms in samples.items()},
        {name: len(forms) for name, forms in samples.items()},
    )


def _error(samples: Tensor) -> float:
    """The standard error of their mean."""
    return float(samples.std()) / len(samples) ** 0.5


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

    Raises:
        Unsupported: the network's outputs are no class scores.
    """
    generator = torch.Generator().manual_seed(seed)
    images = 0
    with _differentiable(network, names) as (twin, weights):
        sums = [torch.zeros_like(weight) for weight in weights]
        for image in (image for batch in batches for image in batch.split(1)):
            scores = twin(image)
            if not are_class_scores(scores):
                raise Unsupported("measure fisher draws from class scores (B, classes); kl, hawq and sqnr need none")
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


def _forms(
    network: nn.Module, weights: dict[str, Tensor], batches: Iterable[Tensor], probes: dict[str, list[Tensor]]
) -> dict[str, Tensor]:
    """(probes,) of each layer: v'Hv."""
    sums = {name: torch.zeros(len(own), dtype=torch.float64) for name, own in probes.items()}
    images = 0
    for batch in batches:
        outputs = network(batch)
        loss = divergence(outputs, outputs) * len(batch)
        slopes = _gradients(loss, list(weights.values()), again=True)
        for (name, weight), slope in zip(weights.items(), slopes, strict=True):
            for number, probe in enumerate(probes[name]):
                (product,) = torch.autograd.grad(
                    slope, weight, probe, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                sums[name][number] += float((probe * product).sum())
        images += len(batch)
    return {name: total / images for name, total in sums.items()}


def _gradients(value: Tensor, weights: list[Tensor], *, again: bool = False) -> tuple[Tensor, ...]:
    """Zero for weights that the value does not depend on; with `again`, they can be differentiated in their turn."""
    return torch.autograd.grad(value, weights, create_graph=again, allow_unused=True, materialize_grads=True)
