"""Latency of integer networks over that of the float network in the same runtime; below 1 is faster.

    python benchmarks/runtimes.py [--only resnet18 vit_tiny] [--seconds 3] [--batch 1] [--threads 1]

Weights are random, for speed does not depend on them. Rounds time every network once, side by side, so that what
disturbs the machine disturbs all; the table has the median of the rounds' ratios with its 95 % interval, the layers
that ran on integers as the runtime reports them, and the ratio of the float network to itself, which is the noise.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from functools import partial

import numpy as np
from networks import Noise, quantized, random_network
from tabulate import tabulate
from torch import nn

from qbench import registry
from qbench.errors import Unsupported
from qbench.metrics.ratio import paired_ratio
from qbench.runtimes.base import Compiled
from qbench.runtimes.timing import interleave

SIZE = 224
PLACEMENTS = {
    "inputs": "fold_bn + rtn + activations",
    "every_edge": "fold_bn + rtn + activations[placement=every_edge]",
}
RUNTIMES = {"openvino": "inputs", "onnxruntime": "every_edge"}
"""And the placement that each has kernels for; linear models have no use for the latter."""
MODELS = {
    "mobilenetv2_100": ("mobilenetv2_100", 0.50),
    "resnet18": ("resnet18", 0.36),
    "resnet50": ("resnet50", 0.40),
    "vit_tiny": ("vit_tiny_patch16_224", 0.65),
    "efficientnet_b0": ("efficientnet_b0", 0.75),
}
"""timm's name, and the ratio that the better runtime should reach on a processor with VNNI."""


def compiled(runtime: str, network: nn.Module, batch: np.ndarray, threads: int) -> Compiled:
    import torch

    made: Compiled = registry.get("runtime", runtime)().compile(network, torch.from_numpy(batch), threads=threads)
    return made


def measure(name: str, asked: argparse.Namespace) -> list[list[str]]:
    """The table's rows of one model: one for each runtime."""
    architecture, target = MODELS[name]
    model = random_network(architecture, SIZE)
    batch = np.ascontiguousarray(Noise(asked.batch, SIZE).batch(range(asked.batch)).numpy())
    rows = []
    for runtime, preferred in RUNTIMES.items():
        placement = "inputs" if name == "vit_tiny" else preferred
        try:
            integers = compiled(
                runtime, quantized(copy.deepcopy(model), PLACEMENTS[placement], 2, SIZE), batch, asked.threads
            )
            floats = {key: compiled(runtime, model, batch, asked.threads) for key in ("float", "again")}
        except Unsupported as reason:
            rows.append([name, runtime, placement, "–", "–", "–", str(reason)])
            continue
        calls = {key: partial(network.run, batch) for key, network in {"integers": integers, **floats}.items()}
        _, times = interleave(calls, samples=1000, warmup=3, seconds=asked.seconds)
        ratio, low, high = paired_ratio(times["integers"], times["float"])
        noise = paired_ratio(times["again"], times["float"])[0]
        layers = f"{integers.integer_layers}/{integers.compute_layers}"
        ms = 1000 * float(np.median(times["integers"]))
        rows.append(
            [
                name,
                runtime,
                placement,
                f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
                f"{target:.2f}",
                f"{noise:.2f}",
                f"{layers}, {ms:.1f} ms",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring for each model and runtime")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    begin, rows = time.perf_counter(), []
    for name in asked.only:
        rows += measure(name, asked)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    headers = ["model", "runtime", "placement", "int8 / float [95 %]", "target", "float / float", "on integers"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
