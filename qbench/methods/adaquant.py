"""AdaQuant: weights, steps and biases of each layer, learned."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.fakequant import LearnedWeight, keep_positive, quantize_weight
from qbench.quant.layers import encode, encodings, output_axis, select_layers
from qbench.quant.observers import search_weight
from qbench.quant.reconstruction import Cache, Groups, distance, float_weight, minimise, reconstruct
from qbench.quant.sweep import Stop, sweep
from qbench.registry import EdgeBits, LayerBits, method


@method("adaquant", paper="arXiv:2006.10518")
def adaquant(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 4,
    granularity: Literal["tensor", "channel"] = "channel",
    steps: Annotated[int, Field(ge=1)] = 300,
    batch_size: Annotated[int, Field(ge=1)] = 50,
    lr: Annotated[float, Field(gt=0)] = 0.03,
    images: Annotated[int, Field(ge=1)] | None = None,
    layer_bits: LayerBits = None,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Learn weights, steps and biases layer by layer, straight through the rounding, so that outputs change least.

    Weights may move further than to the next level. The target is each layer's output in the float network; the inputs
    are those of the network quantized so far, behind the input quantizers that it has (the authors' sequential form).

    Args:
        model: changed in place.
        data: its calibration images, and its float network.
        bits: width of the codes, -2**(bits-1) to 2**(bits-1) - 1.
        granularity: one step per tensor or per output channel; it starts with the least squared error.
        steps: of Adam, per layer; the authors take 100.
        batch_size: images per step; fewer where an image has more than 14 x 14 positions, as many positions in all.
        lr: learning rate of the weights in units of their mean step; a tenth of it for the step, and a hundredth in
            units of the outputs for the bias. It falls to 0 along a cosine. The authors' rates are absolute.
        images: use the first so many calibration images; default all.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: a step before changed the shape of a layer, or quantized its bias; a layer is not float32.
    """
    model.eval()
    chosen = {name: width for name, _, width in select_layers(model, bits, edge_bits, skip, layer_bits)}
    batches = data.calibration if images is None else data.calibration.first(images)
    fixed = encodings(model)
    errors: dict[str, tuple[float, float]] = {}
    for stop in sweep(model, batches, reference=data.reference, layers=chosen):
        if f"{stop.name}.bias" in fixed:
            raise Unsupported(f"the bias of {stop.name} is quantized: quantize biases after adaquant")
        if stop.layer.weight.dtype not in (torch.float32, torch.float64):
            kind = str(stop.layer.weight.dtype).removeprefix("torch.")
            raise Unsupported(f"{stop.name} is {kind}, too coarse for weights to be learned in: use a float32 model")
        unit = _Layer(stop, chosen[stop.name], granularity)
        generator = torch.Generator(data.device).manual_seed(data.seed * 1_000_003 + stop.index)

        def learn(cache: Cache, unit: _Layer = unit, generator: torch.Generator = generator) -> None:
            order = cache.batches(cache.affordable(batch_size), generator)

            def loss() -> Tensor:
                now = next(order)
                return distance(unit.layer(cache.inputs[now]), cache.targets[now])

            minimise(loss, unit.soften(lr, cache.targets), steps=steps, after=lambda: keep_positive(unit.layer))

        errors[stop.name] = reconstruct(stop, unit.start, learn)
        data.progress((stop.index + 1) / stop.total)
    data.record("reconstruction_error", errors)
    return model


class _Layer:
    """A layer at a stop: how it starts, and how it learns."""

    def __init__(self, stop: Stop, bits: int, granularity: Literal["tensor", "channel"]) -> None:
        self.layer, axis = stop.layer, output_axis(stop.layer)
        self.weight = float_weight(stop.name, stop.layer, stop.reference_layer)
        bias = stop.layer.bias
        self.bias = bias.detach().clone() if isinstance(bias, Tensor) else None
        scale, _ = search_weight(self.weight, bits=bits, granularity=granularity, calibration="mse", axis=axis)
        self.quantizer = LearnedWeight(self.weight, bits, granularity, axis)
        with torch.no_grad():
            self.quantizer.scale.copy_(scale.reshape(self.quantizer.scale.shape))
        self.nearest = self.quantizer.encoding(self.weight)

    def start(self) -> None:
        """Round to nearest, with the bias as it was."""
        encode(self.layer, self.nearest)
        if self.bias is not None:
            with torch.no_grad():
                self.layer.get_parameter("bias").copy_(self.bias)

    def soften(self, lr: float, outputs: Tensor) -> Groups:
        """The float weight behind a quantizer that learns, and what is learned of both."""
        with torch.no_grad():
            self.layer.get_parameter("weight").copy_(self.weight)
        quantize_weight(self.layer, self.quantizer)
        step = self.quantizer.scale.mean().item()
        original = self.layer.get_parameter("parametrizations.weight.original").requires_grad_()
        groups: Groups = [
            {"params": [original], "lr": lr * step, "cosine": True},
            {"params": [self.quantizer.scale], "lr": lr / 10 * step, "cosine": True},
        ]
        if self.bias is not None:
            size = outputs.square().mean().sqrt().item()
            bias = self.layer.get_parameter("bias").requires_grad_()
            groups.append({"params": [bias], "lr": lr / 100 * max(size, 1e-12), "cosine": True})
        return groups
