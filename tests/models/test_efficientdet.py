"""EfficientDet: effdet's own answers and loss, and its absence."""

import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from qbench import registry
from qbench.datasets.base import Boxes
from qbench.errors import UserError
from qbench.models.base import Model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    effdet = pytest.importorskip("effdet", reason="effdet is not installed (pip install 'qbench[efficientdet]')")

OPTIONS = {"classes": 3, "size": 128, "random": 0}


def load(**options: Any) -> Model:
    return registry.resolve("model", "efficientdet", options)()


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Model]:
    """effdet's own network, whose scores differ, and the model with its weights."""
    torch.manual_seed(0)
    config = effdet.get_efficientdet_config("tf_efficientdet_lite0")
    config.num_classes, config.image_size = 3, (128, 128)
    net = effdet.EfficientDet(config, pretrained_backbone=False).eval()
    torch.nn.init.normal_(net.class_net.predict.conv_pw.bias)
    return net, load(**OPTIONS)


@pytest.fixture(scope="module")
def network(pair: tuple[Any, Model]) -> torch.nn.Module:
    from qbench.models.checkpoints import fill

    module = pair[1].build()
    fill(module, pair[0].state_dict())
    return module.eval()


def test_answers_are_effdets(pair: tuple[Any, Model], network: torch.nn.Module) -> None:
    net, model = pair
    x = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        logits, codes = net(x)
        outputs = network(x)
        for one, other in zip(outputs, [*logits, *codes], strict=True):
            torch.testing.assert_close(one, other)
        information = {"img_scale": torch.ones(2), "img_size": torch.full((2, 2), 128.0)}
        expected = effdet.DetBenchPredict(net)(x, information)
    assert model.decode is not None
    for one, rows in zip(model.decode(outputs), expected, strict=True):
        torch.testing.assert_close(one.scores, rows[:, 4], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.xyxy, rows[:, :4], atol=1e-3, rtol=1e-4)
        assert one.labels.tolist() == (rows[:, 5].long() - 1).tolist()


def test_the_loss_is_effdets(pair: tuple[Any, Model], network: torch.nn.Module) -> None:
    net, model = pair
    x = torch.randn(2, 3, 128, 128)
    xyxy = np.array([[10, 20, 60, 90], [40, 8, 120, 100]], dtype=np.float32)
    boxes = [Boxes(xyxy, np.array([2, 0])), Boxes(xyxy[:1], np.array([1]))]
    target = {
        "bbox": [torch.from_numpy(one.xyxy[:, [1, 0, 3, 2]].copy()) for one in boxes],
        "cls": [torch.from_numpy(one.labels + 1) for one in boxes],
        "img_scale": torch.ones(2),
        "img_size": torch.full((2, 2), 128.0),
    }
    expected = effdet.DetBenchTrain(net).eval()(x, target)["loss"]
    torch.testing.assert_close(model.loss(network(x), boxes), expected)
    empty = [Boxes(xyxy[:0], np.array([], dtype=np.int64))] * 2
    assert torch.isfinite(model.loss(network(x), empty))


def test_wrong_options_and_no_effdet_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean 'tf_efficientdet_lite3x'"):
        load(name="tf_efficientdet_lite3xx", random=0)
    with pytest.raises(UserError, match="no multiple of 128"):
        load(size=200, random=0)
    monkeypatch.setitem(sys.modules, "effdet", None)
    with pytest.raises(UserError, match=r"needs effdet, which is not installed \(pip"):
        load(random=0)
