"""`qbench export`: files that other programs run, their card, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qbench import registry
from qbench.cache import cache_dir
from qbench.errors import UserError
from qbench.export import export
from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine, Codebook
from qbench.quant.layers import encode, named_weight_layers, weight_of
from qbench.quant.packing import Origin, pack
from qbench.run import Result
from qbench.store import Store

onnx = pytest.importorskip("onnx", reason="an optional extra: pip install 'qbench[onnx]'")
pytest.importorskip("onnxruntime")

from qbench.runtimes.onnxruntime import open_session  # noqa: E402

KEY = "0123456789ab"


def _network(inputs: bool) -> nn.Module:
    """The residual network with 8-bit weights, and inputs on a grid that is the same for all."""
    model = registry.resolve("model", "digits_resnet")().load().requires_grad_(False)
    for layer in named_weight_layers(model).values():
        weight = weight_of(layer)
        encode(layer, Affine.nearest(weight, weight.flatten(1).abs().amax(1) / 127, bits=8))
        if inputs:
            quantize_input(layer, StaticQuantizer(8, True, 0.05))
    return model


def _artifact(path: Path, model: nn.Module) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pack(model, path, Origin("digits_resnet", {}))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A results folder with one finished run, whose artifact is in the cache."""
    _artifact(cache_dir() / "artifacts" / f"{KEY}.safetensors", _network(inputs=False))
    result = Result(
        key=KEY,
        label="digits/digits_resnet/rtn/seed=0",
        identity={
            "dataset": ["digits", {}, "d1"],
            "model": ["digits_resnet", {}, "w1"],
            "calibration": [16, 0, "m1"],
        },
        recipe="rtn",
        status="ok",
        phase="done",
        started="2026-01-01T00:00:00+00:00",
        task="classification",
    )
    folder = tmp_path / "results" / "suite"
    folder.mkdir(parents=True)
    Store(folder).write(result, {"correct": np.array([True, True, True, False])})
    return tmp_path / "results"


def test_a_run_becomes_a_file_that_answers_alike_and_a_card(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    export(KEY[:5], out, "onnx", results=run, plugins=[])
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "labels.txt", "model.onnx"]
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    session = open_session(str(out / "model.onnx"))
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        wanted = _network(inputs=False)(images).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert (out / "labels.txt").read_text().split() == list("0123456789")
    card = (out / "README.md").read_text()
    for text in (
        "75.00%: 3 of 4 evaluation images",
        "ONNX, opset 21",
        "batch: any",
        "centre crop, no resizing (32x32",
        "mean [0.5]",
        "weights only",
        "codes -127 to 127, a scale per output channel",
        "w1",
        KEY,
    ):
        assert text in card, text


def test_an_artifact_becomes_an_openvino_model_of_bytes(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = _network(inputs=True)
    path = _artifact(tmp_path / "a.safetensors", model)
    export(str(path), tmp_path / "out", "openvino", results=tmp_path, plugins=[])
    weights = sum(weight_of(layer).numel() for layer in named_weight_layers(model).values())
    network = openvino.Core().read_model(tmp_path / "out" / "model.xml")
    constants = [op for op in network.get_ops() if op.get_type_name() == "Constant"]
    octets = [op.get_byte_size() for op in constants if op.get_element_type().get_type_name() == "i8"]
    assert sum(octets) >= weights
    assert (tmp_path / "out" / "model.bin").stat().st_size < 1.3 * weights
    card = (tmp_path / "out" / "README.md").read_text()
    assert "batch: 1, fixed" in card
    assert "have integer weights and integer inputs" in card
    assert "not known: exported from an artifact" in card
    assert not (tmp_path / "out" / "labels.txt").exists()


def _codebooks(path: Path) -> Path:
    model = _network(inputs=False)
    for layer in named_weight_layers(model).values():
        encode(layer, Codebook.nearest(weight_of(layer), torch.linspace(-1, 1, 7)))
    return _artifact(path, model)


def test_what_a_format_cannot_say_leaves_nothing(tmp_path: Path) -> None:
    path = _codebooks(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"cannot be written as openvino: .*codebook weights"):
        export(str(path), tmp_path / "out", "openvino", results=tmp_path, plugins=[])
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("what", "target", "folder", "message"),
    [
        ("ffff", "onnx", "out", "matches no result"),
        ("no/such.safetensors", "onnx", "out", "artifact no/such.safetensors does not exist"),
        (KEY, "tflite", "out", "--format 'tflite': write onnx or openvino"),
        (KEY, "onnx", "file/out", "cannot be written"),
        (KEY, "onnx", "file", "cannot be written"),
    ],
)
def test_mistakes_are_named(run: Path, tmp_path: Path, what: str, target: str, folder: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        export(what, tmp_path / folder, target, results=run, plugins=[])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "results"]


def test_a_run_without_its_artifact_says_so(run: Path, tmp_path: Path) -> None:
    (cache_dir() / "artifacts" / f"{KEY}.safetensors").unlink()
    with pytest.raises(UserError, match=rf"the artifact of run {KEY} is no longer at"):
        export(KEY, tmp_path / "out", "onnx", results=run, plugins=[])


def test_a_failed_run_is_not_exported(run: Path, tmp_path: Path) -> None:
    store = Store(run / "suite")
    result = store.read(KEY)
    assert result is not None
    result.status = "oom"
    store.write(result)
    with pytest.raises(UserError, match="ended with status oom"):
        export(KEY, tmp_path / "out", "onnx", results=run, plugins=[])


def test_without_the_extra_the_reason_is_that(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"onnx is not installed \(pip install 'qbench\[onnx\]'\)"):
        export(KEY, tmp_path / "out", "onnx", results=run, plugins=[])
