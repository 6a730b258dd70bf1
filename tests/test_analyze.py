"""`qbench analyze`: the table, the files, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from qbench.analysis import drawing, heatmap
from qbench.analysis.sensitivity import Sensitivity
from qbench.analyze import analyze
from qbench.errors import UserError

OPTIONS = {"plugins": [], "bits": "2,8", "measure": "kl", "method": "rtn[calibration=mse]", "images": 4, "seed": 0}


def test_the_table_is_printed_and_written(tmp_path, capsys):
    analyze("digits_resnet", "digits", tmp_path / "out", **OPTIONS)
    printed = capsys.readouterr().out
    assert "layer2.0.downsample.1" in printed
    assert "rtn[calibration=mse]" in printed.replace("\n", " ")
    frame = pd.read_csv(tmp_path / "out" / "sensitivity.csv", index_col="layer")
    assert list(frame.columns) == ["8", "2"]
    assert (frame["2"] > frame["8"]).mean() > 0.9
    stored = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert stored["values"]["fc"]["2"] == pytest.approx(frame.loc["fc", "2"])
    assert (stored["images"], stored["measure"], stored["dataset"]) == (4, "kl", "digits")
    with Image.open(tmp_path / "out" / "sensitivity.png") as picture:
        assert min(picture.size) > 300
    assert "layer2.0.downsample.1" in (tmp_path / "out" / "sensitivity.html").read_text()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("bits", "8,four", "--bits '8,four'"),
        ("measure", "kll", "--measure 'kll'"),
        ("method", "fold_bn", "does not take a bit width"),
    ],
)
def test_mistakes_are_named(tmp_path, option, value, message):
    with pytest.raises(UserError, match=message):
        analyze("digits_resnet", "digits", None, **OPTIONS | {option: value})


def test_missing_libraries_are_named_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"heat maps need matplotlib: pip install 'qbench\[analyze\]'"):
        analyze("digits_resnet", "digits", tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_colours_are_on_a_log_scale_without_holes():
    found = Sensitivity("kl", ("a", "b"), (8, 2), np.array([[0.0, 1e-4], [1e-6, 1.0]]))
    np.testing.assert_allclose(heatmap.shades(found), [[-6, -4], [-6, 0]])
    sqnr = Sensitivity("sqnr", ("a",), (8, 2), np.array([[np.inf, 10.0]]))
    np.testing.assert_allclose(heatmap.shades(sqnr), [[10, 10]])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (np.inf, "inf"), (0.01234, "0.012"), (2.04e-7, "2e-7"), (12.3, "12"), (51234, "5e4")],
)
def test_labels_are_short(value, text):
    assert heatmap.label(value) == text
