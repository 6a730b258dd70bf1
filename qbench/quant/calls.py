"""What modules are called with; the first argument may be given by place or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant.hooks import hooked

Args = tuple[Any, ...]


def first_of(args: Args, kwargs: Mapping[str, Any]) -> Any:
    """The first argument; None if there is none."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_first(args: Args, kwargs: Mapping[str, Any], change: Callable[[Any], Any]) -> tuple[Args, dict[str, Any]]:
    """The arguments with the first one changed."""
    if args:
        return (change(args[0]), *args[1:]), dict(kwargs)
    name = next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


def watch_calls(
    model: nn.Module, x: Tensor, modules: Mapping[str, nn.Module], see: Callable[[str, Args, dict[str, Any]], None]
) -> None:
    """Run the model on x, and tell `see` of each call of `modules`: name and arguments."""
    handles = (
        module.register_forward_pre_hook(lambda _, args, kwargs, name=name: see(name, args, kwargs), with_kwargs=True)
        for name, module in modules.items()
    )
    with hooked(handles), torch.no_grad():
        model(x)
