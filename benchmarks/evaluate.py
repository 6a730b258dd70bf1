"""Time qbench's scoring of MobileNetV2 against a plain timm validation loop, cold and warm, in one process.

    python benchmarks/evaluate.py --data <folder with imagenet/> --weights <folder with mobilenetv2_100.safetensors>

The plain loop decodes with a `DataLoader` of as many workers as cores and runs the network in eager mode, contiguous,
in batches of 64, as timm's own script does on a CPU. Cold includes decoding and writing the cache; both include
converting the network. The loops are interleaved, and every round is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from qbench import registry
from qbench.datasets.base import Split
from qbench.datasets.images import open_images
from qbench.models.base import Model
from qbench.score import score


class _Images(Dataset):
    """A split as torchvision would read it."""

    def __init__(self, split: Split, model: Model) -> None:
        own = model.preprocess
        size = [] if split.resized else [transforms.Resize(own.resize, transforms.InterpolationMode.BICUBIC)]
        crop = [transforms.CenterCrop(own.size), transforms.ToTensor(), transforms.Normalize(own.mean, own.std)]
        self.split, self.transform = split, transforms.Compose(size + crop)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.split.load(i).convert("RGB")), self.split.targets[i]


def plain(split: Split, model: Model, threads: int, batch_size: int) -> np.ndarray:
    torch.set_num_threads(threads)
    network = model.load()
    loader = DataLoader(_Images(split, model), batch_size, num_workers=threads)
    with torch.inference_mode():
        return np.concatenate([(network(x).argmax(1) == y).numpy() for x, y in loader])


def cached(split: Split, model: Model, threads: int, cache: Path, fingerprint: str) -> np.ndarray:
    images = open_images(split, model.preprocess, fingerprint, cache, "evaluation")
    outcomes, notes = score(model.load(), model, images, device=torch.device("cpu"), threads=threads)
    print(f"    {notes['executed']}, batches of {notes['batch_size']}")
    return outcomes["correct"]


def timed(name: str, run: Callable[[], np.ndarray]) -> float:
    started = time.perf_counter()
    correct = run()
    seconds = time.perf_counter() - started
    speed = len(correct) / seconds
    print(f"{name:6s} {seconds:7.2f} s  {speed:7.1f} images/s  top-1 {100 * correct.mean():.2f}", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("QBENCH_DATA", "."), help="folder that holds imagenet/")
    parser.add_argument("--weights", help="folder that holds mobilenetv2_100.safetensors; random weights without it")
    parser.add_argument("--images", type=int, help="at most this many")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-size", type=int, default=64, help="of the plain loop")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()

    found = registry.resolve("dataset", "imagenet", {"root": f"{asked.data}/imagenet", "limit": asked.images})()
    split: Split = found.evaluation
    weights = {"checkpoint": f"{asked.weights}/mobilenetv2_100.safetensors"} if asked.weights else {"random": 0}
    args = {"pad_type": "same", "bn_eps": 1e-3}
    options = {"name": "mobilenetv2_100", "args": args, "mean": [0.5] * 3, "std": [0.5] * 3, **weights}
    model: Model = registry.resolve("model", "timm", options)()
    cold, warm = [], []
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as folder:
            reference = timed("plain", lambda: plain(split, model, asked.threads, asked.batch_size))
            for name, ratios in (("cold", cold), ("warm", warm)):
                own = timed(name, lambda f=folder: cached(split, model, asked.threads, Path(f), found.fingerprint))
                ratios.append(reference / own)
    print(f"cold {statistics.median(cold):.2f}x the plain loop's speed; warm {statistics.median(warm):.2f}x")


if __name__ == "__main__":
    main()
