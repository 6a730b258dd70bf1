"""The layers that carry weights, and attaching encodings to them."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from qbench.errors import Unsupported, UserError
from qbench.quant.encodings import Encoding
from qbench.quant.heads import head_bits, heads_of
from qbench.quant.pruning import zeros_of

WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTRIBUTE = "qbench_encodings"


def named_weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name, in registration order; a module that is used twice appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)}


def weight_layers(model: nn.Module) -> list[nn.Module]:
    """Convolutions and linear layers, in registration order."""
    return list(named_weight_layers(model).values())


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's weight, detached, in float32."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def output_axis(layer: nn.Module) -> int:
    """The axis of the weight that counts output channels: 1 for transposed convolutions, else 0."""
    return 1 if isinstance(layer, TRANSPOSED) else 0


def select_layers(
    model: nn.Module,
    bits: int,
    edge_bits: int | None = None,
    skip: tuple[str, ...] = (),
    layer_bits: Mapping[str, int] | None = None,
    *,
    for_inputs: bool = False,
) -> Iterator[tuple[str, nn.Module, int]]:
    """The layer policy that every method understands the same way: `(name, layer, bits)` of the layers to quantize.

    Args:
        model: the model.
        bits: bit width of all layers but the edges.
        edge_bits: bit width of the first and the last layer, or the last ones of a detector's heads; None means
            `bits`, 32 leaves them in float.
        skip: layers left in float: those whose name equals or begins with one of these.
        layer_bits: bit widths of layers whose name equals or begins with a key, whatever `bits`, `edge_bits` and the
            widths that were set for a detector's heads say; the longest key counts.
        for_inputs: the layers' inputs are to be quantized. A weight that several layers share is quantized once, with
            the first of them, but each has an input of its own.

    Raises:
        UserError: a key of `layer_bits` names no layer.
        Unsupported: a weight is no parameter.
    """
    layers = named_weight_layers(model)
    names = list(layers)
    own = _by_name(names, head_bits(model)) | _by_name(names, layer_bits or {})
    edges = _edges(model, names)
    seen: set[int] = set()
    for name, layer in layers.items():
        known = id(layer.weight) in seen and not for_inputs
        if known or any(within(name, prefix) for prefix in skip):
            continue
        if layer._parameters.get("weight") is None:
            raise Unsupported(
                f"{name} computes its weight from other parameters, as weight norm does: make the weight a parameter"
                f" before (torch.nn.utils.parametrize.remove_parametrizations), or leave it in float with skip=[{name}]"
            )
        seen.add(id(layer.weight))
        usual = bits if edge_bits is None or name not in edges else edge_bits
        chosen = own.get(name, usual)
        if chosen < 32:
            yield name, layer, chosen


def full_name(*parts: str) -> str:
    """The name of something inside of a module: parts, of which the first is empty for the model itself, and dots."""
    return ".".join(part for part in parts if part)


def _edges(model: nn.Module, names: list[str]) -> set[str]:
    heads = heads_of(model)
    last = names[-1:] if heads is None else [name for name in names if any(within(name, one) for one in heads.outputs)]
    return {*names[:1], *last}


def within(name: str, prefix: str) -> bool:
    """Whether the name equals the prefix, or is that of something inside of it."""
    return name == prefix or name.startswith(prefix + ".")


def _by_name(names: list[str], layer_bits: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for prefix in sorted(layer_bits, key=len):
        named = [name for name in names if within(name, prefix)]
        if not named:
            raise UserError(f"layer_bits: no layer is named {prefix!r} or begins with {prefix + '.'!r}")
        found |= dict.fromkeys(named, layer_bits[prefix])
    return found


def encode(layer: nn.Module, encoding: Encoding, parameter: str = "weight") -> None:
    """Attach the encoding and set the parameter to its decoded value: the model in memory is what the codes say.

    Raises:
        ValueError: the decoded tensor does not have the parameter's shape.
        Unsupported: it gives pruned weights another value than 0.
    """
    target = getattr(layer, parameter)
    decoded = encoding.decode()
    if decoded.shape != target.shape:
        raise ValueError(f"the encoding decodes to {tuple(decoded.shape)}, but {parameter} is {tuple(target.shape)}")
    zeros = zeros_of(layer) if parameter == "weight" else None
    if zeros is not None and bool(decoded[zeros.to(decoded.device)].any()):
        raise Unsupported("this step does not keep the zeros of prune: use rtn, kmeans or ecsq, or leave prune out")
    with torch.no_grad():
        target.copy_(decoded)
    layer.__dict__.setdefault(_ATTRIBUTE, {})[parameter] = encoding


def encodings(model: nn.Module) -> dict[str, Encoding]:
    """Every attached encoding by the full name of its parameter."""
    return {
        full_name(name, parameter): encoding
        for name, module in model.named_modules()
        for parameter, encoding in module.__dict__.get(_ATTRIBUTE, {}).items()
    }


def clear_encodings(layer: nn.Module) -> None:
    """Forget the encodings of one layer, when its weight is about to be changed."""
    layer.__dict__.pop(_ATTRIBUTE, None)
