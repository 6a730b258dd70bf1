import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qbench.analysis import curves
from qbench.errors import UserError
from qbench.reports import show
from qbench.store import Store

RESULTS = Path(__file__).parents[2] / "results" / "imagenet_small"

RECORDS: dict[str, Any] = {
    "training": {"loss": [4.0, 2.0, 1.0, 3.0]},
    "lsq": {
        "steps": [0, 4],
        "state": {"0.weight.scale": [0.1, 0.2], "0.input.scale": [9.0, 1.0], "0.input.beta": [0.0, -1.0]},
    },
    "cost": {"seconds": 1.0},
}


def test_there_is_a_panel_for_the_loss_and_one_for_each_kind_of_parameter() -> None:
    loss, beta, scale = curves.panels(RECORDS)
    assert loss.curves["each step"] == [4.0, 2.0, 1.0, 3.0]
    assert (beta.title, list(beta.curves)) == ("lsq: mean beta of each quantizer", ["0.input.beta"])
    assert list(scale.curves) == ["0.weight.scale", "0.input.scale"]
    assert scale.log
    assert not beta.log
    assert scale.steps == [0, 4]
    assert curves.panels({"cost": {"seconds": 1.0}}) == []


def test_the_average_is_over_a_fiftieth_of_the_steps() -> None:
    assert curves.smooth([4.0, 2.0, 1.0]) == [4.0, 2.0, 1.0]
    values = [float(i) for i in range(200)]
    assert curves.smooth(values)[:5] == [0.0, 0.5, 1.0, 1.5, 2.5]
    assert curves.summary([4.0, 1.0, 2.0]) == "4 at the start, 2 at the end, lowest 1 at step 1"


def test_show_draws_and_says_how_the_loss_fell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sorted(RESULTS.glob("*.json"))[0]
    folder = tmp_path / "imagenet_small"
    folder.mkdir()
    shutil.copy(path, folder)
    store = Store(folder)
    result = store.read(path.stem)
    assert result is not None
    with pytest.raises(UserError, match="has not trained anything"):
        show(path.stem, tmp_path, tmp_path / "out", as_json=False)
    result.records = RECORDS
    store.write(result)
    show(path.stem, tmp_path, tmp_path / "out", as_json=False)
    assert "loss: 4 at the start, 3 at the end, lowest 1 at step 2" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "training.png") as picture:
        assert min(picture.size) > 300
    assert json.dumps("0.weight.scale") in (tmp_path / "out" / "training.html").read_text()
