"""Every method keeps its promises on a GPU, and does there what it does on a CPU."""

import re
from pathlib import Path

import pytest
import torch
from test_conformance import CASES

from qbench.check import MODELS, check_method
from qbench.devices import best_device
from qbench.errors import Unsupported
from qbench.registry import Reference, parse, resolve
from qbench.workspace import Workspace

AFTER = dict.fromkeys(("compress", "bias_correct"), (resolve("method", "rtn"),))
"""What a method needs to be run before."""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(autouse=True)
def _as_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that a run has, for the time of a test."""
    for setting in ("deterministic", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, setting, getattr(torch.backends.cudnn, setting))
    best_device()


def error(reference: Reference, model: str, device: str, cache: Path) -> float:
    """How far the quantized network's answers are from the float one's, relatively."""
    space = Workspace(resolve("dataset", "digits"), resolve("model", model), (64, 0), cache, torch.device(device))
    trains = reference.plugin.attributes["track"] == "qat"
    floats = space.model.load().to(device).eval().requires_grad_(False)
    quantized = space.model.load().to(device)
    for step in (*AFTER.get(reference.name, ()), reference):
        torch.manual_seed(0)
        quantized = step(quantized, space.data(seed=0, trains=trains, reference=floats)).eval()
    images = next(iter(space.data(seed=0, trains=False).calibration))
    with torch.no_grad():
        found, wanted = quantized(images), floats(images)
    return float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted))


@pytest.mark.parametrize("case", CASES)
def test_promises(case: str) -> None:
    checks = list(check_method(resolve("method", *parse(case)), device="cuda"))
    assert not [check for check in checks if not check.ok]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_as_good_as_on_a_cpu(case: str, model: str, tmp_path: Path) -> None:
    reference = resolve("method", *parse(case))
    try:
        here = error(reference, model, "cpu", tmp_path / "cache")
    except Unsupported as reason:
        with pytest.raises(Unsupported, match=re.escape(str(reason))):
            error(reference, model, "cuda", tmp_path / "cache")
        return
    # Not equal: what is near the middle between two levels may be rounded the other way.
    assert error(reference, model, "cuda", tmp_path / "cache") < 1.5 * here + 1e-5
