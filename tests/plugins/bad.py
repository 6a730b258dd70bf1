"""Methods that misbehave in every way that a run must survive."""

import ctypes
import os
import subprocess
import time
from pathlib import Path

import numpy as np
from torch import nn

from qbench import Unsupported, method, metric


@method("hangs")
def hangs(model: nn.Module, data: object) -> nn.Module:
    """Never return, with a child process that does not either."""
    child = subprocess.Popen(["sleep", "1000"])
    with Path(os.environ["QBENCH_TEST_PIDS"]).open("a") as file:
        file.write(f"{os.getpid()}\n{child.pid}\n")
    while True:
        time.sleep(1)


@method("segfaults")
def segfaults(model: nn.Module, data: object) -> nn.Module:
    """Read address 0."""
    ctypes.string_at(0)
    return model


@method("eats_memory")
def eats_memory(model: nn.Module, data: object) -> nn.Module:
    """Take memory until there is none."""
    hoard = []
    while True:
        hoard.append(bytearray(50_000_000))
        time.sleep(0.01)


@method("raises")
def raises(model: nn.Module, data: object) -> nn.Module:
    """Fail in the middle of the work."""
    raise RuntimeError("the method failed")


@method("declines")
def declines(model: nn.Module, data: object) -> nn.Module:
    """Support nothing."""
    raise Unsupported("no model is good enough")


@method("returns_a_string")
def returns_a_string(model: nn.Module, data: object) -> str:
    """Return something that is not a module."""
    return "model"


@method("trains_in_secret")
def trains_in_secret(model: nn.Module, data) -> nn.Module:
    """Use labels in the ptq track."""
    next(iter(data.train.epoch(0, batch_size=4, seed=0)))
    return model


@method("restructures")
def restructures(model: nn.Module, data: object) -> nn.Module:
    """Change the network behind qbench's back."""
    model.fc = nn.Sequential(model.fc, nn.Identity())
    return model


@method("poisons")
def poisons(model: nn.Module, data: object) -> nn.Module:
    """Make weights that are not numbers."""
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


@metric("aborts", unit="1", direction="none")
def aborts(finished: object) -> dict[str, float]:
    """Bring the process down while measuring."""
    os.abort()


@metric("answers", unit="1", direction="higher")
def answers(finished: object) -> dict[str, object]:
    """Measure something of one's own, of some images, too."""
    return {"value": 42.0, "outcomes": {"each": np.arange(3)}}
