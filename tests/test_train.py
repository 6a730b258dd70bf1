import json
from pathlib import Path

import pytest
import safetensors
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
