"""What a layer is given and answers in the float network, and how much an error of each answer matters.

It matters by the divergence of the network's outputs from themselves. Its gradient is 0 where nothing is quantized, and
its Hessian J' (diag(p) - pp') J, where p are the class probabilities and J is the derivative of the logits. So the
gradients are taken of random combinations of logits, with diag(p) - pp' for covariance: their squares have the
Hessian's diagonal for expectation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.calls import Args


@dataclass(frozen=True)
class Evidence:
    """Of all images, (n, ...) each."""

    inputs: tuple[Tensor, ...]
    outputs: Tensor
    importance: Tensor
    """Of the outputs' shape: estimates of the Hessian's diagonal."""


@torch.no_grad()
def probes(model: nn.Module, batches: Iterable[Tensor], seed: int) -> list[Tensor]:
    """Random combinations of each batch's logits, (B, classes).

    Args:
        model: the float network, in evaluation mode.
        batches: of images.
        seed: of the combinations.

    Raises:
        Unsupported: the outputs are no logits.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for images in batches:
        logits = model(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise Unsupported("the divergence of the outputs is that of class probabilities, but they are no logits")
        chances = logits.softmax(1)
        noise = torch.randn(logits.shape, generator=generator).to(logits) * chances.sqrt()
        found.append(noise - chances * noise.sum(1, keepdim=True))
    return found


def gather(model: nn.Module, name: str, batches: Iterable[Tensor], combinations: list[Tensor]) -> Evidence:
    """The evidence of one module.

    Args:
        model: the float network, in evaluation mode.
        name: of the module, which is called with tensors.
        batches: of images.
        combinations: of their logits, from `probes`.

    Raises:
        Unsupported: the module is called more than once.
    """
    inputs: list[tuple[Tensor, ...]] = []
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []

    def see(_module: nn.Module, args: Args, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if len(outputs) > len(gradients):
            raise Unsupported(f"{name} is called more than once")
        inputs.append(tuple(argument.detach() for argument in (*args, *kwargs.values())))
        outputs.append(output.detach().requires_grad_())
        # A copy, because what comes next may work in place.
        return outputs[-1].clone()

    handle = model.get_submodule(name).register_forward_hook(see, with_kwargs=True)
    with handle, _constant_parameters(model), torch.enable_grad():
        for images, combination in zip(batches, combinations, strict=True):
            gradients += torch.autograd.grad(model(images), outputs[-1], combination)
    joined = tuple(torch.cat(parts) for parts in zip(*inputs, strict=True))
    return Evidence(joined, torch.cat(outputs).detach(), torch.cat(gradients).square())


@contextmanager
def _constant_parameters(model: nn.Module) -> Iterator[None]:
    """Nothing in front of the module is part of the graph then."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_()
