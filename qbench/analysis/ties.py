"""Layers that read the same tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant.calls import Args, first_of
from qbench.quant.hooks import hooked


def readers(model: nn.Module, names: Iterable[str], example: Tensor) -> list[list[str]]:
    """The layers among these that are called with the same tensor in a forward pass, where several are.

    Integer runtimes quantize such a tensor once for all of them: the first convolution of a residual block and the one
    of its shortcut, or the projections to queries, keys and values.

    Args:
        model: in evaluation mode.
        names: of modules.
        example: an input of the model.
    """
    # The tensors are kept, so that none gets the identity of one that has gone.
    seen: dict[int, tuple[Tensor, list[str]]] = {}

    def see(name: str) -> Any:
        def hook(_: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
            x = first_of(args, kwargs)
            seen.setdefault(id(x), (x, []))[1].append(name)

        return hook

    handles = (
        model.get_submodule(name).register_forward_pre_hook(see(name), prepend=True, with_kwargs=True) for name in names
    )
    with hooked(handles), torch.no_grad():
        model(example)
    return [called for _, called in seen.values() if len(called) > 1]
