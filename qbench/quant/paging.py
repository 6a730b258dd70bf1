"""Live activations beyond a memory budget go to a temporary file, and come back when an operation touches them."""

from __future__ import annotations

import ctypes
import math
import tempfile
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(eq=False)
class _Page:
    """The memory of one activation; `offset` is its place in the file while it is there."""

    memory: StorageWeakRef
    size: int
    owner: Hashable
    offset: int | None = None
    shared: bool = False
    lent: list[weakref.ref[Tensor]] = field(default_factory=list)

    def storage(self) -> torch.UntypedStorage | None:
        """The memory itself; None when nobody holds it any more."""
        if self.memory.expired():
            return None
        return torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)

    def movable(self) -> bool:
        """Nobody outside the owner's forward pass looks at it."""
        self.lent = [ref for ref in self.lent if ref() is not None]
        return self.offset is None and not self.shared and not self.lent


_limit = math.inf
_gpu_share = 1.0


def limit_memory(limit: float, gpu_share: float = 1.0) -> None:
    """Tell that this process is killed when it holds more bytes than that, and may take this share of a GPU's."""
    global _limit, _gpu_share
    _limit, _gpu_share = limit, gpu_share


def available(device: torch.device) -> int:
    """Bytes of memory that are free on the device, and that this process may still take."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(min(free, _gpu_share * total - torch.cuda.memory_allocated(device))))
    held = psutil.Process().memory_info().rss
    return max(0, int(min(psutil.virtual_memory().available, _limit - held)))


class Pager(TorchDispatchMode):
    """Keeps what several suspended computations hold below `budget` bytes.

    Use `with pager.running(owner)` around every stretch of a computation. Memory allocated there belongs to `owner`,
    and while `owner` is suspended it may be moved to the file. Whoever was suspended last goes first: the computations
    take turns, so that one is needed again the latest.
    """

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget, self.spilled = budget, 0
        self._pages: dict[int, _Page] = {}
        self._resident = 0
        self._turns: dict[Hashable, None] = {}
        self._owner: Hashable = None
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        self._end = 0
        self._holes: dict[int, list[int]] = {}

    @contextmanager
    def running(self, owner: Hashable) -> Iterator[None]:
        """Between here and the end of the block, `owner` computes."""
        self._turns.pop(owner, None)
        self._owner = owner
        with self:
            yield
        self._turns[owner] = None
        self._forget_dead()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {_key(value) for value in tree_leaves((args, kwargs)) if _has_memory(value)}
        for key in given & self._pages.keys():
            self._touch(self._pages[key])
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if _has_memory(value) and _key(value) not in given:
                self._add(value.untyped_storage())
        return result

    def lend(self, tensor: Tensor) -> Tensor:
        """The tensor for a reader outside: itself, kept in memory while held, or a copy of what is in the file."""
        page = self._pages.get(_key(tensor))
        if page is None or page.offset is None:
            alias = tensor.detach()
            if page is not None:
                page.lent.append(weakref.ref(alias))
            return alias
        copy = torch.UntypedStorage(page.size, device=tensor.device)
        self._read(copy, page.offset)
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(copy, tensor.storage_offset(), tensor.size(), tensor.stride())

    def close(self) -> None:
        """Bring back what somebody still holds, and delete the file."""
        for page in self._pages.values():
            self._load(page)
        self._pages.clear()
        self._file.close()

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._pages or not storage.nbytes():
            return
        self._pages[storage._cdata] = _Page(StorageWeakRef(storage), storage.nbytes(), self._owner)
        self._resident += storage.nbytes()
        self._shrink()

    def _touch(self, page: _Page) -> None:
        # Memory that two computations read is a cache in the network: outside readers may meet it at any time.
        page.shared |= page.owner != self._owner
        if page.offset is not None:
            self._load(page)
            self._shrink()

    def _shrink(self) -> None:
        if self._resident <= self.budget:
            return
        self._forget_dead()
        for owner in reversed(self._turns):
            for page in self._pages.values():
                if self._resident <= self.budget:
                    return
                if page.owner == owner and page.movable():
                    self._spill(page)

    def _forget_dead(self) -> None:
        for key in [key for key, page in self._pages.items() if page.memory.expired()]:
            page = self._pages.pop(key)
            if page.offset is None:
                self._resident -= page.size
            else:
                self._holes.setdefault(page.size, []).append(page.offset)

    def _spill(self, page: _Page) -> None:
        storage = page.storage()
        if storage is None or not storage.resizable():
            return
        holes = self._holes.get(page.size)
        offset = holes.pop() if holes else self._end
        host = storage.cpu()  # kept while its memory is read
        self._file.seek(offset)
        self._file.write(_raw(host))
        # Only now, so that the memory is still there where the disk is full.
        page.offset = offset
        self._end = max(self._end, offset + page.size)
        storage.resize_(0)
        self._resident -= page.size
        self.spilled += page.size

    def _load(self, page: _Page) -> None:
        storage = page.storage()
        if storage is None or page.offset is None:
            return
        storage.resize_(page.size)
        self._read(storage, page.offset)
        self._holes.setdefault(page.size, []).append(page.offset)
        page.offset = None
        self._resident += page.size

    def _read(self, storage: torch.UntypedStorage, offset: int) -> None:
        host = storage if storage.device.type == "cpu" else torch.UntypedStorage(storage.nbytes())
        self._file.seek(offset)
        if self._file.readinto(_raw(host)) != host.nbytes():
            raise OSError("the temporary file of the sweep was cut short")
        if host is not storage:
            storage.copy_(host)


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _raw(storage: torch.UntypedStorage) -> memoryview:
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
