"""The first argument of a layer's call, which may be given by place or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
