"""The sweep: one pass through the network for all methods that quantize layer by layer.

Such a method needs, for each layer, its input in the float network (X) and in the network quantized so far (X~). Every
calibration batch's forward pass is a coroutine that stops in front of each layer. When all batches stand there, the
method sees their inputs and quantizes the layer; then all go on, with the quantized layer. So both networks are walked
once, whatever Python code they consist of, and only those activations live that the suspended forward passes hold.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from qbench.errors import Unsupported, UserError
from qbench.quant.activations import input_quantizer
from qbench.quant.calls import first_of, with_first
from qbench.quant.gram import Grams, Sampling, grams
from qbench.quant.layers import named_weight_layers
from qbench.quant.paging import Pager, available


class _Walk(greenlet):
    """One batch on its way through one network."""

    def __init__(self, network: nn.Module, batch: Tensor) -> None:
        super().__init__()
        self._network, self._batch = network, batch
        self.at: str | None = None
        self.call: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
        self.seen: set[str] = set()

    def run(self) -> None:
        # A copy: networks that change their input in place would change it for each other.
        batch = self._batch.clone()
        del self._batch
        self._network(batch)

    def park(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Stop in front of a layer until the sweep goes on."""
        self.at, self.call = name, (args, kwargs)
        parent = self.parent
        assert parent is not None
        parent.switch()
        self.seen.add(name)

    def input(self, name: str) -> Tensor:
        """What the layer that it stands in front of is called with."""
        if self.at != name:
            raise RuntimeError(f"the inputs of {name} are gone: the sweep has moved on")
        first = first_of(*self.call)
        if not isinstance(first, Tensor):
            raise Unsupported(f"{name} is not called with a tensor, but with {type(first).__name__}")
        return first


class Inputs(Sequence[Tensor]):
    """A layer's inputs, one tensor per batch, read one at a time so that memory stays within the budget.

    A tensor is valid until the sweep goes on: clone what must live longer.
    """

    def __init__(self, name: str, walks: list[_Walk], pager: Pager) -> None:
        self._name, self._walks, self._pager = name, walks, pager

    def __len__(self) -> int:
        return len(self._walks)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return Inputs(self._name, self._walks[index], self._pager)
        return self._pager.lend(self._walks[index].input(self._name))

    @property
    def shapes(self) -> list[torch.Size]:
        """The shape of each, without reading it."""
        return [walk.input(self._name).shape for walk in self._walks]


@dataclass(frozen=True)
class Stop:
    """All batches stand in front of this layer."""

    name: str
    layer: nn.Module
    """In the network that is being quantized."""
    reference_layer: nn.Module
    """In the float network; the layer itself where that is not walked."""
    inputs: Inputs
    """X~: the inputs in the network quantized so far, behind the layer's input quantizer if it has one."""
    reference_inputs: Inputs
    """X: the inputs of the same batches in the float network; empty where that is not walked."""
    index: int
    total: int
    """This is stop `index` of at most `total`."""

    def grams(self, sampling: Sampling | None = None) -> Grams:
        """The Gram matrices of the layer's inputs, summed over the batches.

        Raises:
            Unsupported: the layer's output is not its weight times patches of its input.
        """
        try:
            return grams(self.layer, self.inputs, self.reference_inputs or None, sampling)
        except Unsupported as error:
            raise Unsupported(f"{self.name}: {error}; leave it in float with skip=[{self.name}]") from None


def sweep(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    reference: nn.Module | None = None,
    layers: Iterable[str] | None = None,
    walk_reference: bool = True,
    budget: int | None = None,
) -> Iterator[Stop]:
    """Stop at each layer in the order of execution, with its inputs in both networks.

    Quantize `stop.layer` before asking for the next stop; an input quantizer that it gets at the stop, in place of none
    or of an identity, is in effect from this call on. A layer is stopped at once: when it is called again (a shared
    module, a tied weight), it is already quantized, and a warning says so. A batch that does not come by a layer is not
    among its inputs; a layer that no batch comes by is warned about at the end.

    Args:
        model: in evaluation mode; its layers are changed by the caller at each stop.
        batches: calibration images (B, C, H, W), float32.
        reference: the float network, unchanged by the sweep; default: a copy of the model as it is now.
        layers: names of the modules to stop at; default: all convolutions and linear layers.
        walk_reference: False for methods that need X~ only: half the time and memory.
        budget: bytes that the suspended forward passes may hold in memory, beyond which they are kept in a temporary
            file; default: half of what is free.

    Raises:
        UserError: a network is in training mode.
        Unsupported: the float network lacks one of the layers.
    """
    names = list(named_weight_layers(model) if layers is None else layers)
    if reference is None or reference is model:
        reference = copy.deepcopy(model) if walk_reference else model
    for network in (model, reference):
        if any(module.training for module in network.modules()):
            raise UserError("a sweep needs the network in evaluation mode: call model.eval() first")
    return _Sweep(model, reference, names, walk_reference, budget).stops(batches)


class _Sweep:
    def __init__(
        self, model: nn.Module, reference: nn.Module, names: list[str], walk_reference: bool, budget: int | None
    ) -> None:
        self.networks = [model, reference] if walk_reference else [model]
        self.layers = {name: model.get_submodule(name) for name in names}
        self.floats = {name: _counterpart(reference, name) for name in names}
        self.rank = {name: position for position, name in enumerate(names)}
        self.done: set[str] = set()
        self.repeated: set[str] = set()
        self.budget = budget

    def stops(self, batches: Iterable[Tensor]) -> Iterator[Stop]:
        handles = [
            module.register_forward_pre_hook(self._arrival(name), with_kwargs=True)
            for modules in ([self.layers, self.floats] if len(self.networks) == 2 else [self.layers])
            for name, module in modules.items()
        ]
        walks: list[list[_Walk]] = []
        pager: Pager | None = None
        try:
            for batch in batches:
                if pager is None:
                    pager = Pager(available(batch.device) // 2 if self.budget is None else self.budget)
                    as_laid_out = _layout(self.networks[0], batch)
                walks.append([_Walk(network, as_laid_out(batch)) for network in self.networks])
                for walk in walks[-1]:
                    self._advance(walk, pager)
            if pager is not None:
                yield from self._rounds(walks, pager)
        finally:
            for walk in (walk for pair in walks for walk in pair if not walk.dead):
                walk.parent = getcurrent()
                walk.throw()
            for handle in handles:
                handle.remove()
            if pager is not None:
                pager.close()
        missed = [name for name in self.layers if name not in self.done]
        if missed:
            warnings.warn(f"no calibration batch comes by {', '.join(missed)}: left as they are", stacklevel=2)

    def _rounds(self, walks: list[list[_Walk]], pager: Pager) -> Iterator[Stop]:
        while standing := {walk.at for pair in walks for walk in pair if walk.at is not None}:
            # Where batches take different ways, the layer listed first: those behind it can still come by the others.
            name = min(standing, key=self.rank.__getitem__)
            here = [pair for pair in walks if all(walk.at == name for walk in pair)]
            if here:
                inputs = Inputs(name, [pair[0] for pair in here], pager)
                floats = Inputs(name, [pair[1] for pair in here if len(pair) == 2], pager)
                yield Stop(name, self.layers[name], self.floats[name], inputs, floats, len(self.done), len(self.layers))
                self._finish(name)
            if len(self.done) == len(self.layers):
                # One batch walks to the end, to learn whether a layer is called again.
                self._advance(walks[0][0], pager)
                return
            for walk in (walk for pair in walks for walk in pair if walk.at == name):
                self._advance(walk, pager)

    def _finish(self, name: str) -> None:
        self.done.add(name)
        weights = {id(parameter) for parameter in self.layers[name].parameters()}
        for other, module in self.layers.items():
            if other not in self.done and weights and weights == {id(parameter) for parameter in module.parameters()}:
                self.done.add(other)
                warnings.warn(f"{other} has the weight of {name}: it is quantized for {name} alone", stacklevel=4)

    def _advance(self, walk: _Walk, pager: Pager) -> None:
        walk.at, walk.call = None, ((), {})
        if walk.dead:
            return
        walk.parent = getcurrent()
        with torch.no_grad(), pager.running(walk):
            walk.switch()

    def _arrival(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        def arrive(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            walk = getcurrent()
            if not isinstance(walk, _Walk):
                return None
            if name not in self.done:
                before = input_quantizer(module)
                walk.park(name, args, kwargs)
                after = input_quantizer(module)
                if after is not None and after is not before:
                    # It was attached here, behind the place in this call where it would have been asked.
                    return with_first(args, kwargs, after)
            elif name in walk.seen and name not in self.repeated:
                self.repeated.add(name)
                warnings.warn(f"{name} is called more than once: it is quantized for its first call", stacklevel=2)
            return None

        return arrive


def _counterpart(reference: nn.Module, name: str) -> nn.Module:
    try:
        return reference.get_submodule(name)
    except AttributeError:
        raise Unsupported(f"the float network has no layer {name!r}: a step before changed the structure") from None


def _layout(network: nn.Module, batch: Tensor) -> Callable[[Tensor], Tensor]:
    """Channels last where the network can take it: convolutions on a CPU are then twice as fast."""
    if batch.dim() != 4 or batch.device.type != "cpu":
        return lambda images: images
    with torch.no_grad():
        try:
            network(batch[:1].clone(memory_format=torch.channels_last))
        except RuntimeError:  # a view that only fits the other layout
            return lambda images: images
    return lambda images: images.to(memory_format=torch.channels_last)
