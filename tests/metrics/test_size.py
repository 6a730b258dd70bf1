"""Bytes of the artifact, of what gzip makes of it, and of the network's files in other formats."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deployable import finished
from ended import ended, measured

from qbench.judges import judge_metrics
from qbench.metrics.base import Finished
from qbench.metrics.size import size
from qbench.quant import packing


def _packed(tmp_path: Path, **options: bool) -> Finished:
    run = finished(tmp_path, **options)
    sizes = packing.pack(run.quantized, tmp_path / "a.safetensors", packing.Origin("none", {}))
    return replace(run, artifact=tmp_path / "a.safetensors", sizes=sizes, float_bytes=2000)


def test_all_sizes_of_one_network(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    run = _packed(tmp_path)
    values = size(run, formats=("onnx", "openvino"))
    assert values["file_bytes"] == run.artifact.stat().st_size
    assert values["gzip_bytes"] == pytest.approx(len(gzip.compress(run.artifact.read_bytes(), 6)), abs=8)
    for name in ("onnx", "openvino"):
        assert values["formats"][name]["bytes"] > 8 * 3 * 9
        assert values["formats"][name]["float_bytes"] > 4 * 8 * 3 * 9
    result = ended(metrics={"size[formats=[onnx,openvino]]": measured(**values)})
    cells, _ = judge_metrics([result])
    assert cells["onnx_bytes"] == values["formats"]["onnx"]["bytes"]
    assert cells["gzip_bytes"] == values["gzip_bytes"]
    assert cells["nominal_bytes"] < cells["entropy_coded_bytes"] + 8 * 13 < cells["packed_bytes"] + 8 * 13


def test_a_format_that_cannot_say_it_has_a_reason(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    values = size(_packed(tmp_path, inputs=False), formats=("openvino",))
    assert "weights only" in values["formats"]["openvino"]["reason"]


def test_more_bytes_than_are_read_at_once(tmp_path: Path) -> None:
    run = _packed(tmp_path)
    data = torch.randint(0, 256, (3 << 20,), dtype=torch.uint8).numpy().tobytes()
    run.artifact.write_bytes(data + bytes(1 << 20))
    assert 3 << 20 < size(run)["gzip_bytes"] < (3 << 20) + 20_000
