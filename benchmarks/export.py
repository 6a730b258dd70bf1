"""Architectures of different families, quantized to 8 bits, in both runtimes: what runs on integers, and how exactly.

    python benchmarks/export.py [--only swin inception] [--placement inputs]

Weights are random and images noise. For each runtime the table has the layers that ran on integers of all that it
reports, and how far its answers are from those of the simulation, relative to their size (2-norms), beside what the
simulation itself does when all sums of its layers change by a millionth; or why the network cannot be exported.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
from networks import Noise, quantized, random_network
from tabulate import tabulate
from torch import nn

from qbench import registry
from qbench.errors import Unsupported
from qbench.runtimes.base import flatten
from qbench.runtimes.pair import distances, rows_of
from qbench.toolkits.agreement import nudged

IMAGES = 2
NETWORKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet": ("resnet18", 64, {}),
    "resnext": ("resnext50_32x4d", 64, {}),
    "regnet": ("regnety_002", 64, {}),
    "densenet": ("densenet121", 64, {}),
    "efficientnet": ("efficientnet_b0", 64, {}),
    "efficientnetv2": ("tf_efficientnetv2_b0", 64, {}),
    "mobilenetv2": ("mobilenetv2_100", 64, {}),
    "mobilenetv3": ("mobilenetv3_small_100", 64, {}),
    "ghostnet": ("ghostnet_100", 64, {}),
    "mobileone": ("mobileone_s0", 64, {}),
    "repvgg": ("repvgg_a0", 64, {}),
    "vgg": ("vgg11_bn", 224, {}),
    "inception": ("inception_v3", 96, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "convnext": ("convnext_atto", 64, {}),
    "vit": ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 4}),
    "deit": ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64, "depth": 4}),
    "swin": ("swin_tiny_patch4_window7_224", 56, {"img_size": 56, "depths": (2, 2, 2)}),
    "mixer": ("mixer_s32_224", 64, {"img_size": 64}),
    "resmlp": ("resmlp_12_224", 64, {"img_size": 64}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "levit": ("levit_128s", 224, {}),
    "poolformer": ("poolformer_s12", 64, {}),
}


def measure(name: str, placement: str) -> list[str]:
    """The table's row of one architecture."""
    architecture, size, options = NETWORKS[name]
    model = quantized(
        random_network(architecture, size, **options), f"fold_bn + rtn + activations[placement={placement}]", 4, size
    )
    x = Noise(IMAGES, size).batch(range(IMAGES))
    with torch.no_grad():
        wanted, moved = (rows_of([t.numpy() for t in flatten(net(x))]) for net in (model, nudged(model)))
    found = [answer(runtime, model, x, wanted) for runtime in ("openvino", "onnxruntime")]
    return [name, architecture, *found, f"{np.median(distances(moved, wanted)):.1e}"]


def answer(runtime: str, model: nn.Module, x: torch.Tensor, wanted: np.ndarray) -> str:
    """One cell: counts and distance, or the reason."""
    try:
        compiled = registry.get("runtime", runtime)().compile(model, x, threads=1)
    except Unsupported as reason:
        return f"no: {reason}"
    distance = np.median(distances(rows_of(compiled.run(np.ascontiguousarray(x.numpy()))), wanted))
    return f"{compiled.integer_layers}/{compiled.compute_layers}, {distance:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="FAMILY")
    parser.add_argument("--placement", choices=["inputs", "every_edge"], default="inputs")
    asked = parser.parse_args()
    begin, rows = time.perf_counter(), []
    for name in asked.only:
        try:
            rows.append(measure(name, asked.placement))
        except Unsupported as reason:
            rows.append([name, NETWORKS[name][0], f"no: {reason}", "", ""])
        print(f"{time.perf_counter() - begin:.0f} s: {' | '.join(rows[-1])}", file=sys.stderr, flush=True)
    headers = ["family", "network", "OpenVINO: integers, difference", "ONNX Runtime", "rounding alone"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
