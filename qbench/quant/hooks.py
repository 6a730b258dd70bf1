"""Hooks that are there for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """The hooks are removed in the end, whatever happens; those of a generator are attached at the beginning."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield
