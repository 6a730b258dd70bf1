"""Every method quantizes a detector as it does a classifier: it runs, or says why not, and the boxes can be decoded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_conformance import CASES

from qbench import registry
from qbench.errors import Unsupported
from qbench.quant.layers import encodings
from qbench.sharing import Shared
from qbench.worker import frozen
from qbench.workspace import Workspace

# What has no place in a detector, or does not know its outputs, and the words that say so.
REFUSED = {
    "activations": "no attention|needs linear layers",
    "compress": "no weight has codes",
    "mixed": "measure fisher draws from class scores",
    "nncf_ptq": "quantizes an operand of Resize",
    "ort_static": "quantizes a constant of Resize",
    "ptq4vit": "no attention",
    "qa_ibp": "no bounds for interpolate",
    "repq_vit": "no attention",
}
ABSENT = "is not installed|this processor has no"
CHANGED = {"activations", "bias_correct", "fp32", "prune", "train"}
"""Methods whose weights have no codes."""


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder: Path = tmp_path_factory.mktemp("detectors")
    model, dataset = registry.resolve("model", "digit_detector"), registry.resolve("dataset", "digit_scenes")
    return Workspace(dataset, model, (8, 0), folder, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_detectors_are_quantized(case: str, space: Workspace) -> None:
    reference = registry.resolve("method", *registry.parse(case))
    network = space.model.load()
    float_network = frozen(network)
    trains = reference.plugin.attributes["track"] == "qat"
    data = space.data(seed=0, trains=trains, reference=float_network)
    data.shared = Shared()
    name = case.partition("[")[0]
    refused = ""
    try:
        quantized = reference(network, data)
    except Unsupported as error:
        refused = str(error)
    if re.search(ABSENT, refused):
        pytest.skip(refused)
    if refused:
        assert re.search(REFUSED[name], refused)
        return
    images = next(iter(data.calibration.first(4, 4)))
    with torch.no_grad():
        answers = quantized.eval()(images)
    assert space.model.decode is not None
    assert len(space.model.decode(answers)) == 4
    assert encodings(quantized) or name in CHANGED or reference.plugin.attributes["track"] == "structure"
