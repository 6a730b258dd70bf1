"""SmoothQuant."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from timm.layers import LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.quant.calls import Args, first_of
from qbench.quant.channels import channel_rows, input_ranges, refuse_quantized, scale_inputs
from qbench.quant.layers import weight_of
from qbench.quant.links import Link, links
from qbench.registry import method

_NORMS = {nn.LayerNorm: -1, LayerNorm: -1, nn.RMSNorm: -1, RmsNorm: -1, LayerNorm2d: 1, RmsNorm2d: 1}
"""Types that end in a multiplication by their weight, with the axis of its channels in their output."""
_LEAST = 1e-5


@method("smooth", track="structure", paper="arXiv:2211.10438")
def smooth(model: nn.Module, data: Data, *, alpha: Annotated[float, Field(ge=0, le=1)] = 0.5) -> nn.Module:
    """Move outliers of activations behind a layer norm into the weights that read them; the float function stays.

    Channel j of the norm's output is divided by s = max|x_j|**alpha / max|w_j|**(1 - alpha), over the calibration
    images and the weights of all layers that read it, which are multiplied by s. It is done behind layer norms and RMS
    norms whose output nothing but convolutions and linear layers read. Channels that are always 0 keep their weights.

    Args:
        model: changed in place; one without such norms is returned as it is.
        data: its calibration images.
        alpha: 0 evens out the weights, 1 the activations.

    Raises:
        UserError: a layer is quantized already.
    """
    model.eval()
    norms = {name: _NORMS[type(module)] for name, module in model.named_modules() if type(module) in _NORMS}
    found = [
        link
        for link in links(model, data.example, {**norms})
        if not link.clips and weight_of(model.get_submodule(link.source)).dim() == 1
    ]
    layers = {name: model.get_submodule(name) for link in found for name in link.readers}
    refuse_quantized(layers, "smooth")
    tops = _maxima({link.readers[0]: layers[link.readers[0]] for link in found}, model, data.calibration)
    spread = {}
    for link in found:
        top = tops[link.readers[0]]
        _scale(model, link, top, alpha)
        spread[link.source] = float(top.max() / top.median().clamp(min=_LEAST))
    data.record("smooth", {"norms": len(found), "largest_to_median": spread})
    return model


@torch.no_grad()
def _scale(model: nn.Module, link: Link, top: Tensor, alpha: float) -> None:
    readers: list[Any] = [model.get_submodule(name) for name in link.readers]
    read = torch.stack([input_ranges(layer, weight_of(layer)) for layer in readers]).amax(0).double()
    factor = (top.double().clamp(min=_LEAST) ** alpha / read.clamp(min=_LEAST) ** (1 - alpha)).clamp(min=_LEAST)
    factor = torch.where((top > 0) & (read > 0), factor, 1.0)
    source = model.get_submodule(link.source)
    for parameter in source.parameters(recurse=False):
        parameter.copy_(parameter.double() / factor)
    for layer in readers:
        layer.weight.copy_(scale_inputs(layer, weight_of(layer).double(), factor))


@torch.no_grad()
def _maxima(layers: dict[str, nn.Module], model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """The largest magnitude (C,) in each channel of the layers' inputs."""
    found: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
        top = channel_rows(layer, first_of(args, kwargs)).abs().amax(1).float()
        found[name] = torch.maximum(found[name], top) if name in found else top

    handles = [layer.register_forward_pre_hook(partial(see, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for batch in batches if layers else []:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
