import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from qbench import registry
from qbench.errors import UserError
from qbench.registry import Reference
from qbench.train import FROM_SCRATCH, train


def reference(kind: registry.Kind, name: str) -> Reference:
    return registry.resolve(kind, name)


def test_a_checkpoint_is_written_with_how_it_was_made(tmp_path: Path) -> None:
    out = tmp_path / "new" / "model.safetensors"
    model, dataset = reference("model", "digits_efficientnet"), reference("dataset", "digits")
    report = train(
        model, dataset, out, schedule=FROM_SCRATCH.model_copy(update={"epochs": 3, "batch_size": 32, "lr": 3e-3})
    )
    assert report["evaluation"]["top1"] > 0.3
    assert report["evaluation"]["images"] == 600
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    with safetensors.safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["qbench_training"]) == report
        names = set(file.keys())
        assert all(file.get_tensor(name).dtype in (torch.float32, torch.int64) for name in names)
    assert names == set(model().build().state_dict())


def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"digits_vit is for classification, but dataset digit_scenes is for detection"):
        train(reference("model", "digits_vit"), reference("dataset", "digit_scenes"), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        train(reference("model", "digits_vit"), reference("dataset", "digits"), tmp_path / "file" / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_training_starts_from_what_fits(tmp_path: Path) -> None:
    source = registry.resolve("model", "timm", {"name": "test_resnet", "random": 1})().load().state_dict()
    safetensors.torch.save_file(source, tmp_path / "backbone.safetensors")
    model = registry.resolve("model", "ssd", {"backbone": "test_resnet", "classes": 10, "size": 96, "random": 0})
    out = tmp_path / "out.safetensors"
    short = FROM_SCRATCH.model_copy(update={"steps": 1, "batch_size": 2, "lr": 1e-9, "weight_decay": 0.0})
    report = train(
        model, reference("dataset", "digit_scenes"), out, schedule=short, start=str(tmp_path / "backbone.safetensors")
    )
    told = report["training"]["start"]
    assert told["checkpoint"].endswith("backbone.safetensors")
    assert all(name.startswith(("head.", "backbone.extra.")) for name in told["new"])
    trained = safetensors.torch.load_file(out)
    assert torch.allclose(trained["backbone.body.conv1.0.weight"], source["conv1.0.weight"])
    assert set(report["evaluation"]) > {"AP", "AP50", "images"}


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"anything": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"nothing of checkpoint .*other.safetensors has the name and shape"):
        train(
            reference("model", "digits_vit"),
            reference("dataset", "digits"),
            tmp_path / "m.safetensors",
            start=str(tmp_path / "other.safetensors"),
        )
    assert not (tmp_path / "m.safetensors").exists()
