"""What a training step of LSQ costs beside a step of the float network: paired, interleaved, on the same batches.

    python benchmarks/qat.py [--architecture resnet18] [--size 64] [--batch-size 32] [--steps 20] [--threads 1]

The target for W4A4 is a ratio below 1.6.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor

from qbench.data import Batches, Data, Training
from qbench.methods.lsq import lsq
from qbench.models.base import cross_entropy
from qbench.quant.schedule import Schedule


class Noise:
    """Random images, channels last in memory as those of a dataset are."""

    def __init__(self, images: int, size: int) -> None:
        self.images = torch.randn(images, 3, size, size).to(memory_format=torch.channels_last)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.images[list(positions)]


def measure(architecture: str, size: int, batch_size: int, steps: int, **options: Any) -> dict[str, Any]:
    """What `fit` records about its paired steps."""
    model = timm.create_model(architecture, num_classes=10).eval()
    noise, records = Noise(2 * batch_size, size), {}
    cpu = torch.device("cpu")
    training = Training(noise, [i % 10 for i in range(len(noise))], cpu, None)
    data = Data(
        Batches(noise, cpu), training, cross_entropy, reference=copy.deepcopy(model), record=records.__setitem__
    )
    lsq(model, data, schedule=Schedule(steps=steps, batch_size=batch_size, lr=1e-3), **options)
    timing: dict[str, Any] = records["training"]["timing"]
    return timing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", default=["resnet10t", "resnet18"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'architecture':<14} {'granularity':<12} {'float ms':>9} {'LSQ ms':>9} {'ratio':>6} {'memory':>7}")
    for architecture in arguments.architecture:
        for granularity in ("tensor", "channel"):
            torch.manual_seed(0)
            timing = measure(
                architecture, arguments.size, arguments.batch_size, arguments.steps, granularity=granularity
            )
            ratio = statistics.median(q / f for q, f in zip(timing["quantized"], timing["float"], strict=True))
            plain, own = (1e3 * statistics.median(timing[key]) for key in ("float", "quantized"))
            memory = timing["saved_bytes"]["quantized"] / timing["saved_bytes"]["float"]
            print(f"{architecture:<14} {granularity:<12} {plain:9.1f} {own:9.1f} {ratio:6.2f} {memory:7.2f}")


if __name__ == "__main__":
    main()
