"""timm models: preprocessing, weights, and errors of one line."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from qbench import registry
from qbench.errors import UserError
from qbench.models.base import Model


def load(plugin: str = "timm", /, **options: Any) -> Model:
    return registry.resolve("model", plugin, options)()


def test_preprocessing_is_the_models_own() -> None:
    own = load(name="mobilenetv2_100", random=0).preprocess
    assert (own.size, own.resize, own.interpolation) == ((224, 224), 256, "bicubic")
    assert own.mean == (0.485, 0.456, 0.406)


def test_preprocessing_can_be_given() -> None:
    own = load(name="mobilenetv2_100", random=0, size=96, resize=0, mean=[0.0] * 3, std=[1.0] * 3, mode="squash")
    assert (own.preprocess.size, own.preprocess.resize, own.preprocess.mode) == ((96, 96), None, "squash")
    assert own.preprocess.std == (1.0, 1.0, 1.0)


def test_grey_input() -> None:
    spec = load(name="test_resnet", random=0, args={"in_chans": 1})
    height, width = spec.preprocess.size
    assert spec.preprocess.channels == 1
    assert spec.load()(torch.zeros(1, 1, height, width)).shape == (1, 1000)


def test_random_weights_follow_the_seed() -> None:
    one, same, other = (load(name="test_resnet", random=seed).weights for seed in (1, 1, 2))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    before = torch.get_rng_state()
    one.load()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    spec = load(name="test_resnet", checkpoint=str(tmp_path / "a.safetensors"), args={"num_classes": 7})
    assert torch.equal(spec.load().state_dict()["conv1.0.weight"], state["conv1.0.weight"])
    with pytest.raises(UserError, match="does not fit"):
        load(name="test_resnet", checkpoint=str(tmp_path / "a.safetensors")).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "test_resent", "random": 0}, "did you mean 'test_resnet'"),
        ({"name": "test_resnet"}, "give one of pretrained"),
        ({"name": "test_resnet", "random": 0, "pretrained": True}, "give one of pretrained"),
        ({"name": "test_resnet", "random": 0, "mean": [0.5]}, "a value for each channel"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**options)


def test_wrong_arguments_of_the_architecture() -> None:
    with pytest.raises(UserError, match="cannot build 'test_resnet' with args"):
        load(name="test_resnet", random=0, args={"colour": 1}).build()


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"pretrained weights of timm 'test_resnet' cannot be had .*no route to host"):
        load(name="test_resnet", pretrained=True).weights.fingerprint()


def test_mobilenet_v1(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QBENCH_WEIGHTS", str(shared / "weights"))
    spec = load("mobilenetv1")
    assert (spec.preprocess.resize, spec.preprocess.mean) == (256, (0.5, 0.5, 0.5))
    assert sum(p.numel() for p in spec.load().parameters()) == pytest.approx(470_000, rel=0.02)
    person = load(
        "mobilenetv1",
        checkpoint="vww_mobilenetv1_025_96.safetensors",
        classes=2,
        activation="relu",
        size=96,
        resize=0,
        mean=[0, 0, 0],
        std=[1, 1, 1],
    )
    assert person.load()(torch.zeros(1, 3, 96, 96)).shape == (1, 2)
