"""Operations, and the energy that a model of a 45 nm chip gives them. A model: nothing here is measured."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from qbench.metrics.base import Finished
from qbench.metrics.coverage import macs
from qbench.quant.activations import StaticQuantizer, input_quantizer
from qbench.quant.calls import Args, first_of
from qbench.quant.encodings import Affine
from qbench.quant.hooks import hooked
from qbench.quant.layers import encodings, full_name, named_weight_layers, weight_of
from qbench.quant.matmuls import MatMul, products
from qbench.registry import metric

SOURCE = "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014: 45 nm, 0.9 V"
PICOJOULES = {
    "multiply int8": 0.2,
    "add int32": 0.1,
    "multiply float32": 3.7,
    "add float32": 0.9,
    "read 64 bits of a 1 MB SRAM": 100.0,
    "read 64 bits of DRAM": 1300.0,
}
_FLOAT = 32.0


@dataclass(frozen=True)
class Layer:
    """What one layer, or one product of activations, does with one image."""

    macs: int
    weights: int
    """Numbers; 0 for a product of activations."""
    weight_bits: float
    """Of a weight as it is stored."""
    inputs: int
    """Numbers that it reads."""
    input_bits: float
    outputs: int
    """Numbers that it writes."""
    integers: bool
    """Both factors are codes of uniform grids, so that it multiplies and adds integers."""


@metric("operations", unit="BOPs", direction="lower")
def operations(finished: Finished) -> dict[str, Any]:
    """Bit operations, and picojoules by a model of a chip: operations times a table of what each costs.

    A multiply-accumulate counts the bits of its weight times those of its input, 32 for floats. In the model integers
    cost a multiplication of 8 bits in proportion to the product of both widths, and a sum of 32 bits; all others a
    multiplication and a sum of float32. Weights are read once from DRAM at the width they are stored in, inputs once
    from SRAM. Norms, activation functions and sums between layers are left out.

    Returns:
        `bops`, `picojoules` by `arithmetic`, `weights` and `inputs`, and both for the float network; the `table` and
        its `source`; `layers`: what is counted of each.
    """
    layers = count(finished.quantized, finished.data.example)
    floats = {name: as_float(layer) for name, layer in layers.items()}
    return {
        "bops": bit_operations(layers),
        "float_bops": bit_operations(floats),
        "picojoules": picojoules(layers),
        "float_picojoules": picojoules(floats),
        "table": PICOJOULES,
        "source": SOURCE,
        "layers": {name: asdict(layer) for name, layer in layers.items()},
    }


def as_float(layer: Layer) -> Layer:
    """The same layer in the float network."""
    return replace(layer, weight_bits=_FLOAT, input_bits=_FLOAT, integers=False)


def bit_operations(layers: dict[str, Layer]) -> float:
    """Multiply-accumulates times the bits of both factors."""
    return sum(layer.macs * layer.weight_bits * layer.input_bits for layer in layers.values())


def picojoules(layers: dict[str, Layer]) -> dict[str, float]:
    """Of one image, by the table."""
    dram, sram = (PICOJOULES[f"read 64 bits of {memory}"] / 64 for memory in ("DRAM", "a 1 MB SRAM"))
    return {
        "arithmetic": sum(layer.macs * _multiply_add(layer) for layer in layers.values()),
        "weights": sum(layer.weights * layer.weight_bits * dram for layer in layers.values()),
        "inputs": sum(layer.inputs * layer.input_bits * sram for layer in layers.values()),
    }


def _multiply_add(layer: Layer) -> float:
    if not layer.integers:
        return PICOJOULES["multiply float32"] + PICOJOULES["add float32"]
    share = layer.weight_bits * layer.input_bits / 64
    return PICOJOULES["multiply int8"] * share + PICOJOULES["add int32"]


def count(model: nn.Module, example: Tensor) -> dict[str, Layer]:
    """What every layer and every exposed product does, by name; those that are never called are left out.

    Args:
        model: in evaluation mode.
        example: an input, a batch of one.
    """
    attached = encodings(model)
    watched: dict[str, nn.Module] = {**named_weight_layers(model), **products(model)}
    traffic: dict[str, tuple[int, int]] = {}
    with _watched(watched, traffic):
        _, by_layer = macs(model, example)
    found = {}
    for name, (inputs, outputs) in traffic.items():
        module = watched[name]
        if isinstance(module, MatMul):
            left, right = module.left, module.right
            weights, width, bits = 0, _input_bits(right), _input_bits(left)
            integers = _static(left) and _static(right)
        else:
            encoding = attached.get(full_name(name, "weight"))
            weights = weight_of(module).numel()
            width, bits = _FLOAT if encoding is None else encoding.nominal_bits / weights, _input_bits(module)
            integers = isinstance(encoding, Affine) and _static(module)
        found[name] = Layer(by_layer[name], weights, width, inputs, bits, outputs, integers)
    return found


def _input_bits(module: nn.Module) -> float:
    return float(getattr(input_quantizer(module), "bits", _FLOAT))


def _static(module: nn.Module) -> bool:
    return isinstance(input_quantizer(module), StaticQuantizer)


def _watched(modules: dict[str, nn.Module], traffic: dict[str, tuple[int, int]]) -> AbstractContextManager[None]:
    """Count the numbers that each module reads and writes, in all of its calls together."""

    def see(name: str, module: nn.Module, args: Args, kwargs: dict[str, Any], output: Tensor) -> None:
        inputs, outputs = traffic.get(name, (0, 0))
        tensors = args if isinstance(module, MatMul) else (first_of(args, kwargs),)
        traffic[name] = inputs + sum(tensor.numel() for tensor in tensors), outputs + output.numel()

    return hooked(m.register_forward_hook(partial(see, name), with_kwargs=True) for name, m in modules.items())
