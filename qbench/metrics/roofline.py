"""What this machine could make of the network at best, beside what the runtime makes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from qbench.metrics.base import Finished
from qbench.metrics.operations import Layer, as_float, count
from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, weight_of
from qbench.registry import metric
from qbench.runtimes.base import Runtime
from qbench.runtimes.choice import AUTO, RuntimeChoice
from qbench.runtimes.pair import deploy
from qbench.runtimes.timing import interleave

_ROWS, _COLUMNS, _DEPTH = 512, 2048, 1024
"""Of the matrix product whose speed is the ceiling: far more arithmetic than memory."""
_COPIED = 1 << 27  # bytes: no cache holds them


@dataclass(frozen=True)
class Ceilings:
    """The fastest that the machine was seen to be, with the threads that the network has."""

    integer_macs: float
    """Multiply-accumulates of int8 per second, in the runtime."""
    float_macs: float
    memory_bytes: float
    """Read or written per second."""


@metric("roofline", unit="of float", direction="none", exclusive=True)
def roofline(
    finished: Finished,
    *,
    runtime: RuntimeChoice = AUTO,
    batch_size: Annotated[int, Field(ge=1)] = 1,
    threads: Annotated[int, Field(ge=1)] = 1,
    samples: Annotated[int, Field(ge=5)] = 30,
    seconds: Annotated[float, Field(gt=0)] = 10.0,
) -> dict[str, Any]:
    """Expected and achieved speed-up: each layer is as fast as arithmetic or memory allows, whichever is slower.

    The ceilings are measured: a large matrix product of the runtime in int8 and in float, and a large copy. Codes move
    one byte a number, floats four; weights come from memory for every batch, although small networks stay in caches.
    Norms, activation functions and sums between layers cost nothing here, so what is achieved falls short of it.

    Returns:
        `ceilings`; for `quantized` (not for the float reference) and `float`: `expected` seconds per batch, with how
        many layers are bound by `arithmetic` and by `memory`, and measured seconds, one a round.

    Args:
        finished: the run.
        runtime: that executes both; `auto` is the one that executes the quantized network fastest.
        batch_size: images per call.
        threads: of the runtime.
        samples: rounds.
        seconds: after which no further round begins.

    Raises:
        Unsupported: the network is not deployable as integers.
    """
    deployed = deploy(finished, runtime, batch_size, threads)
    ceilings = measure_ceilings(deployed.engine, threads)
    layers = count(finished.quantized, finished.data.example)
    floats = {name: as_float(layer) for name, layer in layers.items()}
    calls = {name: partial(network.run, deployed.batch) for name, network in deployed.networks.items()}
    _, times = interleave(calls, samples=samples, warmup=3, seconds=seconds)
    networks = {"quantized": layers, "float": floats}
    expected = {name: bounds(networks[name], ceilings, batch_size) for name in networks if name in times}
    return {**deployed.facts, "ceilings": vars(ceilings), "expected": expected, **times}


def bounds(layers: Mapping[str, Layer], ceilings: Ceilings, batch_size: int) -> dict[str, float]:
    """Seconds that a batch takes at least, and how many layers are bound by what."""
    found = {"seconds": 0.0, "arithmetic": 0, "memory": 0}
    for layer in layers.values():
        width = 1 if layer.integers else 4
        moved = layer.weights + batch_size * (layer.inputs + layer.outputs)
        arithmetic = batch_size * layer.macs / (ceilings.integer_macs if layer.integers else ceilings.float_macs)
        memory = width * moved / ceilings.memory_bytes
        found["seconds"] += max(arithmetic, memory)
        found["arithmetic" if arithmetic > memory else "memory"] += 1
    return found


def measure_ceilings(engine: Runtime, threads: int) -> Ceilings:
    """The best of several rounds, products and copies side by side.

    Raises:
        Unsupported: the runtime has no integer kernel for a matrix product here.
    """
    calls: dict[str, Callable[[], object]] = {}
    batch = torch.rand(1, _ROWS, _DEPTH)
    for name, layer in (("integers", _integers(_product())), ("floats", _product())):
        compiled = engine.compile(layer, batch, threads=threads)
        calls[name] = partial(compiled.run, np.ascontiguousarray(batch.numpy()))
    _, times = interleave(calls, samples=15, warmup=2, seconds=5.0)
    macs = _ROWS * _COLUMNS * _DEPTH
    return Ceilings(macs / min(times["integers"]), macs / min(times["floats"]), 2 * _COPIED / _copying(threads))


def _product() -> nn.Module:
    return nn.Linear(_DEPTH, _COLUMNS, bias=False).eval().requires_grad_(False)


def _integers(layer: nn.Module) -> nn.Module:
    weight = weight_of(layer)
    encode(layer, Affine.nearest(weight, weight.abs().amax(1) / 127, bits=8))
    quantize_input(layer, StaticQuantizer(8, False, 1 / 255))
    return layer


def _copying(threads: int) -> float:
    """Seconds of the fastest copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    source, target = (torch.ones(_COPIED, dtype=torch.uint8) for _ in range(2))
    fastest = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        fastest = min(fastest, time.perf_counter() - begin)
    torch.set_num_threads(before)
    return fastest
