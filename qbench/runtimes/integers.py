"""Which layers of a quantized network can run on integers, and a copy of the network that is written in integers."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qbench.errors import Unsupported
from qbench.quant.activations import StaticQuantizer, input_quantizer, input_quantizers, quantize_input
from qbench.quant.edges import edges
from qbench.quant.encodings import Affine, Encoding
from qbench.quant.layers import encodings, full_name, named_weight_layers, output_axis
from qbench.quant.matmuls import MatMul, operands, products

NOT = "not deployable as integers: "
_FLOAT_KINDS = {
    "Codebook": "codebook weights run as gather + float",
    "VectorCodebook": "codebook weights run as gather + float",
    "Cast": "narrow float weights are no integers",
    "Sum": "a sum of encodings is no integer",
    "Rotated": "rotated weights are no integers",
    "Scaled": "codes with scales that are codes run as gather + float",
}


def is_quantized(model: nn.Module) -> bool:
    """Whether anything is attached to the model: encodings or input quantizers."""
    return bool(encodings(model) or input_quantizers(model))


def judge(model: nn.Module) -> tuple[tuple[str, ...], dict[str, str]]:
    """The layers and products of activations that can run on integers, and the other layers with the reason.

    Raises:
        Unsupported: there is no such layer, or one whose input is quantized, or a product whose operands are, cannot:
            it would run a simulation.
    """
    attached = encodings(model)
    layers = named_weight_layers(model)
    reasons = {name: why_float(layer, attached.get(full_name(name, "weight"))) for name, layer in layers.items()}
    floats = {name: reason for name, reason in reasons.items() if reason is not None}
    factors, others = operands(model), edges(model)
    for name, quantizer in input_quantizers(model).items():
        if name in others and (simulated := _why_float_input(quantizer)) is not None:
            raise Unsupported(f"{NOT}sums, joins or pools with {simulated} ({name})")
        if name not in layers and name not in factors and name not in others:
            raise Unsupported(f"{NOT}{name} has a quantizer but is no convolution or linear layer")
    if floats and len(floats) == len(layers):
        reason, count = Counter(floats.values()).most_common(1)[0]
        raise Unsupported(NOT + reason + (f" ({count} of {len(layers)} layers)" if count < len(layers) else ""))
    for name, reason in floats.items():
        if input_quantizer(layers[name]) is not None:
            raise Unsupported(f"{NOT}{reason} ({name})")
    integer = [name for name in layers if name not in floats]
    for name, product in products(model).items():
        if any(input_quantizer(operand) is not None for operand in product.children()):
            simulated = _why_float_product(product)
            if simulated is not None:
                raise Unsupported(f"{NOT}{simulated} ({name})")
            integer.append(name)
    return tuple(integer), floats


def why_float(layer: nn.Module, encoding: Encoding | None) -> str | None:
    """Why the layer cannot multiply int8 weights with 8-bit inputs; None if it can."""
    if encoding is None:
        return "float weights"
    if not isinstance(encoding, Affine):
        return _FLOAT_KINDS.get(type(encoding).__name__, f"{type(encoding).__name__} weights are no integers")
    if encoding.group_size is not None:
        return "scales for groups of columns"
    if encoding.scale.numel() > 1 and encoding.axis != output_axis(layer):
        return "scales that are not per output channel"
    codes = _centred(encoding)
    low, high = int(codes.min()), int(codes.max())
    if not torch.equal(codes, codes.round()):
        return "weights with a fractional zero point"
    if low < -128 or high > 127:
        return f"weight codes from {low} to {high} do not fit int8"
    return _why_float_input(input_quantizer(layer))


def _why_float_input(quantizer: nn.Module | None) -> str | None:
    if quantizer is None:
        return "no input quantizers: weights only"
    if not isinstance(quantizer, StaticQuantizer):
        return f"{getattr(quantizer, 'kind', type(quantizer).__name__)} input quantizers"
    if quantizer.bits > 8:
        return f"inputs of {quantizer.bits} bits"
    return None


def _why_float_product(product: MatMul) -> str | None:
    quantizers = [input_quantizer(operand) for operand in product.children()]
    if None in quantizers:
        return "a product of activations of which one operand is float"
    for quantizer in quantizers:
        reason = _why_float_input(quantizer)
        if reason is not None:
            return f"operands of products of activations with {reason}"
        if int(quantizer.zero_point):  # type: ignore[union-attr, arg-type]
            return "operands of products of activations with a zero point (symmetric=true has none)"
    return None


def _centred(encoding: Affine) -> Tensor:
    """The codes less their zero points, (N, d): what is multiplied with the scale."""
    rows = encoding.codes.movedim(encoding.axis, 0).flatten(1).float()
    return rows if encoding.zero_point is None else rows - encoding.zero_point


class IntegerWeight(nn.Module):
    """A weight computed from int8 codes: the form that runtimes recognise, whatever is folded into the scales."""

    codes: Tensor
    scale: Tensor

    def __init__(self, encoding: Affine) -> None:
        super().__init__()
        shape, axis = encoding.codes.shape, encoding.axis
        rows = _centred(encoding).to(torch.int8)
        moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
        self.register_buffer("codes", rows.reshape(moved).movedim(0, axis).contiguous())
        broadcast = [1] * len(shape)
        broadcast[axis] = shape[axis]
        self.register_buffer("scale", encoding.scale.expand(shape[axis], 1).reshape(broadcast).contiguous())

    def forward(self, _original: Tensor) -> Tensor:
        return self.codes.to(torch.float32) * self.scale


class IntegerInput(nn.Module):
    """A static quantizer of 8 bits that does what one of fewer bits does: runtimes know 8 bits only.

    Codes outside of the narrower range are cut off before they arise; inside, the two agree exactly.
    """

    def __init__(self, quantizer: StaticQuantizer) -> None:
        super().__init__()
        self.scale, self.zero_point = float(quantizer.scale), int(quantizer.zero_point)
        self.low = -128 if quantizer.symmetric else 0
        self.cut = quantizer.bits < 8
        self.least = (quantizer.low - self.zero_point) * self.scale
        self.most = (quantizer.high - self.zero_point) * self.scale

    def clip(self, x: Tensor) -> Tensor:
        """To the range of fewer bits."""
        return x.clamp(self.least, self.most) if self.cut else x

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(
            self.clip(x), self.scale, self.zero_point, self.low, self.low + 255
        )


def with_integers(
    model: nn.Module,
    names: tuple[str, ...],
    weight: type[IntegerWeight] = IntegerWeight,
    quantizer: type[IntegerInput] = IntegerInput,
) -> nn.Module:
    """A copy on the CPU where `names` have weights made of int8 codes, and all that is quantized has 8 bits.

    Args:
        model: with encodings and input quantizers.
        names: layers and products that `judge` calls integers.
        weight: computes a weight from its codes.
        quantizer: rounds inputs.
    """
    attached = encodings(model)
    copied = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for name in names:
        layer = copied.get_submodule(name)
        if isinstance(layer, MatMul):
            for operand in layer.children():
                _replace(operand, quantizer)
            continue
        encoding = attached[full_name(name, "weight")]
        assert isinstance(encoding, Affine)
        parametrize.register_parametrization(layer, "weight", weight(encoding), unsafe=True)
        _replace(layer, quantizer)
    for edge in edges(copied).values():
        if input_quantizer(edge) is not None:
            _replace(edge, quantizer)
    return copied


def _replace(layer: nn.Module, quantizer: type[IntegerInput]) -> None:
    static = input_quantizer(layer)
    assert isinstance(static, StaticQuantizer)
    quantize_input(layer, quantizer(static))
