from types import SimpleNamespace
from typing import Any

import pytest

from qbench.errors import Unsupported
from qbench.metrics.training_time import training_time


def finished(records: dict[str, Any]) -> Any:
    return SimpleNamespace(records=records, cost={"peak_memory_bytes": 10})


RECORD = {
    "loss": [3.0, 2.0, 1.5, 1.0],
    "seconds": [0.4, 0.3, 0.3, 0.2],
    "loading_seconds": [0.1, 0.1, 0.1, 0.1],
    "steps_per_epoch": 2,
    "batch_size": 8,
    "timing": {"quantized": [0.3, 0.3], "float": [0.2, 0.2], "saved_bytes": {"quantized": 20, "float": 10}},
}


def test_raw_samples_are_passed_on() -> None:
    values = training_time(finished({"training": RECORD}))
    assert values["quantized"] == [0.3, 0.3]
    assert values["float"] == [0.2, 0.2]
    assert values["seconds"] == pytest.approx(1.2)
    assert values["loading_seconds"] == pytest.approx(0.4)
    assert values["last_epoch_loss"] == [1.5, 1.0]
    assert (values["steps"], values["steps_per_epoch"]) == (4, 2)


def test_what_does_not_train_has_no_training_time() -> None:
    with pytest.raises(Unsupported, match="does not train"):
        training_time(finished({}))
    with pytest.raises(Unsupported, match="too short"):
        training_time(finished({"training": RECORD | {"timing": {}}}))
