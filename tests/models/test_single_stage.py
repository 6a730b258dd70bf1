"""Single-stage detectors on timm backbones: torchvision's own answers, shared heads, and what is wrong with options."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD

from qbench import registry
from qbench.datasets.base import Boxes
from qbench.datasets.coco import IDS
from qbench.errors import UserError
from qbench.models.base import Model
from qbench.models.checkpoints import distinct, fill
from qbench.models.fcos import _build as build_fcos
from qbench.models.pyramid import features
from qbench.models.retinanet import _build as build_retinanet
from qbench.models.single_stage import Network, Reader
from qbench.models.timm_ssd import _build as build_ssd
from qbench.quant.layers import select_layers

SIDE = 96
SMALL = {
    "ssd": "ssd[backbone=test_resnet,classes=3,size=96,maps=4,random=0]",
    "ssd300": "ssd[backbone=test_resnet,classes=3,size=96,lite=false,stride=8,maps=5,random=0]",
    "retinanet": "retinanet[backbone=test_resnet,classes=3,size=96,width=16,random=0]",
    "fcos": "fcos[backbone=test_resnet,classes=3,size=160,width=64,depth=1,random=0]",
}
BUILDS = {
    "ssd": lambda: build_ssd("test_resnet", {}, 3, SIDE, True, 16, 4, (0.2, 0.9)),
    "retinanet": lambda: build_retinanet("test_resnet", {}, 3, 16, 4.0),
    "fcos": lambda: build_fcos("test_resnet", {}, 3, 64, 1),
}


def load(reference: str) -> Model:
    return registry.resolve("model", *registry.parse(reference))()


def targets() -> list[Boxes]:
    rows = np.array([[8, 10, 50, 60], [30, 40, 90, 88], [60, 4, 80, 20]], dtype=np.float32)
    return [Boxes(rows, np.array([0, 2, 1])), Boxes(rows[:0], np.array([], dtype=np.int64))]


@pytest.fixture(params=BUILDS)
def detector(request: pytest.FixtureRequest) -> Any:
    """A detector of torchvision that takes images as they are, and finds something."""
    torch.manual_seed(1)
    made: Any = BUILDS[request.param]()
    made.transform.min_size, made.transform.max_size = (SIDE,), SIDE
    made.transform.image_mean, made.transform.image_std = [0.0] * 3, [1.0] * 3
    for layer in made.head.classification_head.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.normal_(layer.bias)
    return made.eval()


def read(detector: Any) -> tuple[Network, Reader]:
    name = {SSD: "ssd", RetinaNet: "retinanet", FCOS: "fcos"}[type(detector)]
    return Network(detector), Reader(BUILDS[name], (SIDE, SIDE), range(1, 4) if name == "ssd" else range(3))


def test_detections_are_torchvisions(detector: Any) -> None:
    network, own = read(detector)
    x = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected, found = detector(list(x)), own.decode(network(x))
    assert len(expected[0]["scores"]) > 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.xyxy, other["boxes"], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(one.scores, other["scores"])
        assert one.labels.tolist() == (other["labels"] - int(isinstance(detector, SSD))).tolist()


def test_the_loss_is_torchvisions(detector: Any) -> None:
    network, own = read(detector)
    x = torch.rand(2, 3, SIDE, SIDE)
    outputs = network(x)
    wanted = [
        {"boxes": torch.from_numpy(one.xyxy), "labels": torch.from_numpy(one.labels) + int(isinstance(detector, SSD))}
        for one in targets()
    ]
    # Statistics of batch norms stay: only the detector itself is told that it trains.
    detector.training = True
    expected = torch.stack(list(detector(list(x), wanted).values())).sum()
    torch.testing.assert_close(own.loss(outputs, targets()), expected)


def test_crowds_are_no_targets(detector: Any) -> None:
    network, own = read(detector)
    outputs = network(torch.rand(2, 3, SIDE, SIDE))
    one, none = targets()
    half = Boxes(one.xyxy[:2], one.labels[:2])
    crowd = Boxes(one.xyxy, one.labels, np.array([False, False, True]))
    assert own.loss(outputs, [crowd, none]) == own.loss(outputs, [half, none])


def test_a_class_that_the_model_does_not_know_is_an_error(detector: Any) -> None:
    network, own = read(detector)
    strange = Boxes(targets()[0].xyxy, np.array([0, 3, 1]))
    with pytest.raises(UserError, match="finds 3 classes, but the dataset has 4 or more"):
        own.loss(network(torch.rand(1, 3, SIDE, SIDE)), [strange])


def test_outputs_that_are_not_finite_are_an_error(detector: Any) -> None:
    network, own = read(detector)
    with torch.no_grad():
        outputs = list(network(torch.rand(1, 3, SIDE, SIDE)))
    outputs[1] = outputs[1] * torch.nan
    with pytest.raises(ValueError, match="not finite"):
        own.decode(outputs)


@pytest.mark.parametrize("name", SMALL)
def test_outputs_do_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    model = load(SMALL[name])
    network, x = model.load(), torch.randn(3, 3, *model.preprocess.size)
    with torch.no_grad():
        for whole, alone in zip(network(x), network(x[1:2]), strict=True):
            torch.testing.assert_close(whole[1:2], alone, atol=1e-4, rtol=1e-4)


def test_every_map_has_a_shared_head_of_its_own_with_one_set_of_weights() -> None:
    network = load(SMALL["retinanet"]).load()
    weights = {name for name, _, _ in select_layers(network, 8) if "_head." in name}
    inputs = {name for name, _, _ in select_layers(network, 8, for_inputs=True) if "_head." in name}
    assert len(weights) == 10
    assert len(inputs) == 50
    made = BUILDS["retinanet"]()
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in made.parameters())


def test_checkpoints_hold_shared_weights_once_under_torchvisions_names(tmp_path: Path) -> None:
    made = BUILDS["retinanet"]()
    state = dict(made.state_dict())
    network = Network(BUILDS["retinanet"]())
    fill(network, state)
    assert torch.equal(network.shared[2].regression_head.bbox_reg.weight, made.head.regression_head.bbox_reg.weight)
    assert distinct(network.state_dict()).keys() == state.keys()
    safetensors.torch.save_file(distinct(network.state_dict()), tmp_path / "w.safetensors")
    again = load(SMALL["retinanet"].replace("random=0", f"checkpoint={tmp_path / 'w.safetensors'}")).load()
    x = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(network.eval()(x)[0], again(x)[0])
    del state["head.regression_head.bbox_reg.weight"]
    with pytest.raises(UserError, match=r"missing: head.regression_head.bbox_reg.weight"):
        fill(network, state)


def test_torchvisions_columns_are_ids_of_coco() -> None:
    own = Reader(BUILDS["retinanet"], (SIDE, SIDE), (0, 2))
    found = {"boxes": torch.rand(4, 4), "scores": torch.rand(4), "labels": torch.tensor([2, 1, 0, 7])}
    kept = own._detections(found)
    assert kept.labels.tolist() == [1, 0]
    assert torch.equal(kept.xyxy, found["boxes"][[0, 2]])
    model = load("torchvision[name=ssdlite320_mobilenet_v3_large,random=0]")
    assert model.preprocess.size == (320, 320)
    assert model.decode.__self__.columns == IDS  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("ssd[backbone=test_resnet]", "give checkpoint: <file.safetensors>, or random"),
        ("ssd[backbone=test_resnett,random=0]", "did you mean 'test_resnet'"),
        ("retinanet[backbone=test_vit,random=0]", "maps of the strides"),
        ("fcos[backbone=test_resnet,width=72,random=0]", "no multiple of 32"),
        ("ssd[backbone=test_resnet,args={nonsense: 1},random=0]", "cannot build 'test_resnet' with args"),
        ("torchvision[name=fasterrcnn_resnet50_fpn,random=0]", "has two stages"),
        ("torchvision[name=retinanet_resnet50,random=0]", "did you mean 'retinanet_resnet50_fpn"),
        ("torchvision[name=ssd300_vgg16,pretrained=true,random=0]", "pretrained goes without"),
    ],
)
def test_wrong_options_are_one_line(reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(reference).load()
    assert "\n" not in str(caught.value)


def test_a_backbone_gives_the_maps_that_are_asked_for() -> None:
    body = features("test_resnet", {}, (8, 32))
    assert [one.shape[-1] for one in body(torch.randn(1, 3, 96, 96))] == [12, 3]
