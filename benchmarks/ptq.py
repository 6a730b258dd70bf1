"""Time and peak memory of every post-training method, each in a process of its own, with its default options.

    python benchmarks/ptq.py [--model mobilenetv2_100] [--images 512] [--only gpfq rtn] [--limit 1800] [--threads 1]

Models are `mobilenetv2_100` and `mobilenetv1_025` (checkpoints in the folder QBENCH_WEIGHTS), or any reference like
`digits_resnet`; calibration images come from the training split of --dataset (`imagenet` in the folder QBENCH_DATA).
The methods are all that the registry has in the tracks `ptq` and `structure`. Peak memory is that of the whole process,
and how much of it came after the network was loaded. Nothing is read that an earlier run has computed, but for decoded
images. On a busy machine the processor's seconds tell more than the clock's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from tabulate import tabulate

from qbench import registry
from qbench.cache import cache_dir
from qbench.errors import UserError
from qbench.sharing import Shared
from qbench.worker import classify, describe, frozen
from qbench.workspace import Workspace

MODELS = {
    "mobilenetv2_100": "timm[name=mobilenetv2_100,checkpoint=mobilenetv2_100.safetensors,"
    "args={pad_type: same, bn_eps: 0.001},mean=[0.5,0.5,0.5],std=[0.5,0.5,0.5]]",
    "mobilenetv1_025": "mobilenetv1[checkpoint=mobilenetv1_025.safetensors,width=0.25]",
}


def run(method: str, model: str, dataset: str, images: int, threads: int) -> dict[str, Any]:
    """One method in this process."""
    torch.set_num_threads(threads)
    plugin = registry.resolve("method", method)
    space = Workspace(
        registry.resolve("dataset", *registry.parse(dataset)),
        registry.resolve("model", *registry.parse(MODELS.get(model, model))),
        (images, 0),
        cache_dir(),
        torch.device("cpu"),
    )
    network = space.model.load()
    data = space.data(seed=0, trains=False, reference=frozen(network))
    data.shared = Shared()
    loaded = peak_bytes()
    clock, processor = time.perf_counter(), time.process_time()
    try:
        plugin(network, data)
        status = "ok"
    except Exception as error:
        status = f"{classify(error)}: {describe(error)}"
    seconds = {"seconds": time.perf_counter() - clock, "processor": time.process_time() - processor}
    peak = peak_bytes()
    return {"status": status, **seconds, "peak": peak, "own": peak - loaded}


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def apart(method: str, asked: argparse.Namespace) -> dict[str, Any]:
    """One method in another process."""
    same = [f"--{name}={getattr(asked, name)}" for name in ("model", "dataset", "images", "threads")]
    command = [sys.executable, __file__, "--run", method, *same]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=asked.limit)
    except subprocess.TimeoutExpired:
        return {"status": f"timeout: more than {asked.limit} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"status": f"crashed: exit code {done.returncode}: {last}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def methods(only: list[str] | None) -> list[str]:
    """All of the tracks that see no labels, or those asked for."""
    known = [name for name in registry.index("method") if registry.get("method", name).attributes["track"] != "qat"]
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise SystemExit(f"unknown method {unknown[0]!r}; methods are: {', '.join(known)}")
    return only or known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--dataset", default="imagenet")
    parser.add_argument("--images", type=int, default=512, help="of the calibration")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods only")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for each method, loading included")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    try:
        if asked.run:
            print(json.dumps(run(asked.run, asked.model, asked.dataset, asked.images, asked.threads)))
            return
    except UserError as error:
        raise SystemExit(str(error)) from None
    rows = []
    for method in methods(asked.only):
        found = apart(method, asked)
        print(f"{method}: {found['status']}, {found.get('seconds', 0):.1f} s", file=sys.stderr, flush=True)
        times = [f"{found[key]:.1f}" if key in found else "–" for key in ("seconds", "processor")]
        memory = [f"{found[key] / 2**20:.0f}" if key in found else "–" for key in ("peak", "own")]
        rows.append([method, *times, *memory, found["status"]])
    print(f"{asked.model}, {asked.images} images of {asked.dataset}, {asked.threads} thread(s)\n")
    headers = ["method", "seconds", "of the processor", "peak MiB", "beyond loading", "status"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
