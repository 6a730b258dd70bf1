"""Give a network to a toolkit, and put on it here what the toolkit has decided."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.quant import structure
from qbench.quant.activations import ChannelQuantizer, StaticQuantizer, input_quantizers, quantize_input
from qbench.quant.adjacency import foldable
from qbench.quant.edges import expose as expose_edges
from qbench.quant.encodings import Affine, move
from qbench.quant.layers import encode, encodings, named_weight_layers
from qbench.quant.matmuls import expose
from qbench.quant.outputs import OUTPUT
from qbench.runtimes.padding import same_padding
from qbench.toolkits.places import Graph, Grid


def require(toolkit: str, *packages: str, extra: str) -> None:
    """Say which toolkit is used; import what is needed of it.

    Raises:
        Unsupported: it is not installed.
    """
    for package in (toolkit, *packages):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise Unsupported(f"{package} is not installed: pip install 'qbench[{extra}]'") from None


def largest_batch(data: Data, limit: int = 32) -> Batches:
    """The calibration images in batches of one size, as large as the limit and their number allow."""
    count = data.calibration.images
    size = max(size for size in range(1, limit + 1) if count % size == 0)
    return data.calibration.first(count, size)


def prepare(model: nn.Module, data: Data, *, exposed: bool = True) -> nn.Module:
    """A float copy on the CPU, in the form in which both have it: batch norms folded, what is added or joined exposed.

    Its convolutions are of torch's own classes, which toolkits know: those of timm with SAME padding are padded first.

    Args:
        model: changed in place, to that form.
        data: its first calibration image.
        exposed: make modules of sums, products and concatenations of activations, where that can be.

    Raises:
        Unsupported: something is quantized already.
    """
    if encodings(model) or input_quantizers(model):
        raise Unsupported("the toolkit quantizes float networks: put it in front of other methods")
    model.eval()
    for layer, norm in foldable(model, data.example):
        structure.apply(model, "fold_bn", layer=layer, norm=norm)
    if exposed:
        expose_edges(model, data.example, every=False)
        _expose_products(model, data.example)
    floats = copy.deepcopy(model).cpu().requires_grad_(False)
    for name, pad in same_padding(floats, data.example.cpu()).items():
        same: Any = floats.get_submodule(name)
        same.padding, same.__class__ = (0, 0), nn.Conv2d
        pad_first(same, pad)
    return floats


def pad_first(layer: nn.Module, pad: list[int]) -> None:
    """Pad what the layer is called with by zeros, in the order of `F.pad`."""
    layer.register_forward_pre_hook(lambda _, args: (F.pad(args[0], pad),))


def _expose_products(model: nn.Module, example: Tensor) -> None:
    try:
        expose(model, example)
    except Unsupported:
        return  # the network multiplies no activations, or where no quantizer can be attached


def adopt(model: nn.Module, graph: Graph) -> None:
    """Put codes, biases and quantizers of the toolkit's network on the model.

    Raises:
        Unsupported: something is quantized that has no place here.
    """
    quantizers = graph.quantizers(model)
    put_parameters(model, graph.parameters(), graph.toolkit)
    for place, grid in quantizers.items():
        if place == OUTPUT:
            structure.apply(model, "expose_output")
        put_quantizer(model, place, grid, graph.toolkit)


def put_parameters(model: nn.Module, parameters: Mapping[str, Affine | Tensor], toolkit: str) -> None:
    """Encode weights, and set biases; a layer without a bias gets one if its is not 0.

    Raises:
        Unsupported: there is no such parameter, or it is shared with another that has other codes.
    """
    kept = {full: value for full, value in parameters.items() if not _is_no_bias(model, full, value)}
    for full, value in kept.items():
        module, _, name = full.rpartition(".")
        owner = model.get_submodule(module)
        if name == "bias" and owner._parameters.get(name) is None:
            structure.apply(model, "add_bias", layer=module)
        target = owner._parameters.get(name)
        if target is None:
            raise Unsupported(f"{toolkit} quantizes a {name} of {module} ({type(owner).__name__}), which has none here")
        if isinstance(value, Affine):
            encode(owner, move(value, target.device), name)
        else:
            with torch.no_grad():
                target.copy_(value)
    for full, value in kept.items():
        wanted = value.decode() if isinstance(value, Affine) else value
        if not torch.equal(model.get_parameter(full).detach().cpu(), wanted.cpu()):
            raise Unsupported(f"{toolkit} quantizes {full} in another way than the layer that it is shared with")


def _is_no_bias(model: nn.Module, full: str, value: Affine | Tensor) -> bool:
    """Whether it is a bias of zeros, of a layer that has none."""
    module, _, name = full.rpartition(".")
    absent = model.get_submodule(module)._parameters.get(name) is None
    return name == "bias" and absent and isinstance(value, Tensor) and not bool(value.any())


def put_quantizer(model: nn.Module, place: str, grid: Grid, toolkit: str) -> None:
    """Attach the quantizer to the input of the module that is called so.

    Raises:
        Unsupported: it has another number of levels than a power of 2.
    """
    bits = (grid.high - grid.low).bit_length()
    if grid.high - grid.low + 1 != 2**bits:
        raise Unsupported(f"{toolkit} quantizes the input of {place} to {grid.high - grid.low + 1} levels")
    device = next(model.parameters()).device
    quantize_input(model.get_submodule(place), _quantizer(grid, bits).to(device))


def _quantizer(grid: Grid, bits: int) -> nn.Module:
    zeros = [zero - grid.low for zero in grid.zero_point]
    if len(grid.scale) > 1:
        quantizer = ChannelQuantizer(bits, len(grid.scale))
        quantizer.scale.copy_(torch.tensor(grid.scale))
        quantizer.zero_point.copy_(torch.tensor(zeros))
        return quantizer
    signed = zeros[0] == 2 ** (bits - 1)
    return StaticQuantizer(bits, signed, grid.scale[0], 0 if signed else zeros[0])


def record(model: nn.Module, data: Data, toolkit: str, agreement: Mapping[str, Any]) -> None:
    """Say in the result which toolkit it was, how well its network is met, and what it left in float."""
    data.record("toolkit", {"name": toolkit, "version": importlib.metadata.version(toolkit)})
    data.record("agreement", dict(agreement))
    coded = {id(model.get_parameter(name)) for name in encodings(model)}
    layers, quantizers = named_weight_layers(model), input_quantizers(model)
    data.record("float_weights", [name for name, layer in layers.items() if id(layer.weight) not in coded])
    data.record("float_inputs", [name for name in layers if name not in quantizers])
    data.record("quantized_elsewhere", [name for name in quantizers if name not in layers])
