"""One pass through the network for all layers, against running its beginning again for every layer, in one run.

    python benchmarks/sweep.py [--model mobilenetv2_100] [--checkpoint FILE] [--images 8] [--size 224] [--threads 1]

Both quantize the same network layer by layer: weights are rounded to 4 bits, then the bias is corrected by the layer's
mean output in the float network and in the network quantized so far, so that each layer needs both inputs. The usual
way runs both networks from the start up to the layer, for every layer; the sweep (`qbench.quant.sweep`) walks each
once. Both must give the same network. The ratio of their times grows with the number of layers. On a busy machine the
processor's seconds tell more than the clock's.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.methods.bias_correct import channel_mean
from qbench.methods.fold_bn import fold_bn
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, named_weight_layers, weight_of
from qbench.quant.observers import search_weight
from qbench.quant.sweep import sweep

BITS = 4


class Noise:
    """Random images, channels last in memory as those of a dataset are."""

    def __init__(self, images: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(images, 3, size, size, generator=generator).to(memory_format=torch.channels_last)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.images[list(positions)]


class _Reached(Exception):  # noqa: N818  it ends a forward pass, and is no failure
    pass


def inputs_of(network: nn.Module, layer: nn.Module, batches: Batches) -> list[Tensor]:
    """What the layer is called with, by running the network up to it."""
    found: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].clone())
        raise _Reached

    handle = layer.register_forward_pre_hook(stop)
    with torch.no_grad():
        for batch in batches:
            with suppress(_Reached):
                network(batch)
    handle.remove()
    return found


def quantize(layer: nn.Module, twin: nn.Module, inputs: Sequence[Tensor], floats: Sequence[Tensor]) -> None:
    """One step of the method: round the weight, correct the bias."""
    weight = weight_of(layer)
    scale, _ = search_weight(weight, bits=BITS)
    encode(layer, Affine.nearest(weight, scale, bits=BITS))
    with torch.no_grad():
        layer.bias += (channel_mean(twin, floats) - channel_mean(layer, inputs)).float()


def usual(model: nn.Module, reference: nn.Module, batches: Batches, order: list[str]) -> None:
    """Both networks run up to each layer."""
    for name in order:
        layer, twin = model.get_submodule(name), reference.get_submodule(name)
        quantize(layer, twin, inputs_of(model, layer, batches), inputs_of(reference, twin, batches))


def one_pass(model: nn.Module, reference: nn.Module, batches: Batches, order: list[str]) -> None:
    """Both networks are walked once."""
    for stop in sweep(model, batches, reference=reference, layers=order):
        quantize(stop.layer, stop.reference_layer, stop.inputs, stop.reference_inputs)


def order_of(model: nn.Module, example: Tensor) -> list[str]:
    """The layers in the order of their calls."""
    called: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda _m, _x, name=name: called.append(name))
        for name, layer in named_weight_layers(model).items()
    ]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return called


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2_100", help="of timm")
    parser.add_argument("--checkpoint", help="safetensors file; random weights without it")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    float_model = timm.create_model(asked.model).eval()
    if asked.checkpoint:
        float_model.load_state_dict(load_file(asked.checkpoint))
    batches = Batches(Noise(asked.images, asked.size), torch.device("cpu"), batch_size=4)
    data = Data(batches, None, nn.functional.cross_entropy)
    fold_bn(float_model, data)
    order = order_of(float_model, data.example)
    print(f"{asked.model}: {len(order)} layers, {asked.images} images of {asked.size} pixels")
    clock: dict[str, float] = {}
    processor: dict[str, float] = {}
    models: dict[str, nn.Module] = {}
    ways: tuple[Callable[..., None], ...] = (usual, one_pass)
    for way in ways:
        model = copy.deepcopy(float_model)
        name, start, used = way.__name__, time.perf_counter(), time.process_time()
        way(model, float_model, batches, order)
        clock[name], processor[name] = time.perf_counter() - start, time.process_time() - used
        models[name] = model
        print(f"{name:<9}{clock[name]:9.2f} s {processor[name]:9.2f} s of the processor", flush=True)
    for name, value in models["usual"].state_dict().items():
        torch.testing.assert_close(models["one_pass"].state_dict()[name], value, rtol=1e-4, atol=1e-5)
    by_clock, by_processor = (seconds["usual"] / seconds["one_pass"] for seconds in (clock, processor))
    print(f"one pass is {by_clock:.1f} times as fast ({by_processor:.1f} by the processor); both networks are the same")


if __name__ == "__main__":
    main()
