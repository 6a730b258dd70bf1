"""Every method keeps its promises on a GPU, and does there what it does on a CPU."""

from pathlib import Path

import pytest
import torch
from test_conformance import CASES
from torch import Tensor

from qbench.check import check_method
from qbench.registry import Reference, parse, resolve
from qbench.workspace import Workspace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32, whose products have 10 bits: roundings would differ from those of a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def answers(reference: Reference, device: str, cache: Path) -> Tensor:
    space = Workspace(
        resolve("dataset", "digits"), resolve("model", "digits_resnet"), (64, 0), cache, torch.device(device)
    )
    trains = reference.plugin.attributes["track"] == "qat"
    floats = space.model.load().to(device).eval().requires_grad_(False)
    torch.manual_seed(0)
    model = reference(space.model.load().to(device), space.data(seed=0, trains=trains, reference=floats)).eval()
    images = next(iter(space.data(seed=0, trains=False).calibration))
    with torch.no_grad():
        found: Tensor = model(images).cpu()
    return found


@pytest.mark.parametrize("case", CASES)
def test_promises(case: str) -> None:
    checks = list(check_method(resolve("method", *parse(case)), device="cuda"))
    assert not [check for check in checks if not check.ok]


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_on_a_cpu(case: str, tmp_path: Path) -> None:
    reference = resolve("method", *parse(case))
    here, there = (answers(reference, device, tmp_path / "cache") for device in ("cpu", "cuda"))
    # A weight or an activation near the middle between two levels may be rounded the other way.
    assert torch.linalg.norm(there - here) < 0.05 * torch.linalg.norm(here)
