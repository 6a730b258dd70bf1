"""What is right, attacked and proved of each image."""

import json

import pytest
import torch
from quantized import GREY, finished, linear, quantize
from torch import nn

from qbench.errors import Unsupported
from qbench.metrics.certified_accuracy import certified_accuracy, check


def run(seed: int, count: int = 12):
    pixels = torch.randint(0, 256, (count, 1, 1, 2), generator=torch.Generator().manual_seed(seed))
    floats = linear(seed, 2, 6, 5, 3, size=3.0)
    with torch.no_grad():
        targets = floats(GREY.normalize(pixels)).argmax(1).tolist()
    model = quantize(linear(seed, 2, 6, 5, 3, size=3.0), GREY.normalize(pixels), bits=4)
    return finished(floats, model, pixels, targets, GREY)


def test_every_image_is_what_trying_all_of_its_neighbours_says() -> None:
    seen = set()
    for seed, radius in ((0, 0), (1, 8), (2, 60)):
        one = run(seed)
        values = certified_accuracy(one, radius=radius, images=10, seconds=60.0)
        assert json.loads(json.dumps(values)) == values
        assert len(values["state"]) == 10
        for i, state in enumerate(values["state"]):
            low, high = ((one.images.pixels([i]).flatten() + change).clamp(0, 255) for change in (-radius, radius))
            ranges = (torch.arange(a, b + 1) for a, b in zip(low.tolist(), high.tolist(), strict=True))
            every = torch.cartesian_prod(*ranges).view(-1, 1, 1, 2)
            robust = bool((one.quantized(GREY.normalize(every)).argmax(1) == one.images.split.targets[i]).all())
            assert values["clean"][i] == bool(one.outcomes["correct"][i])
            assert (state == "robust") == robust
            assert (state == "wrong") == (not values["clean"][i])
            assert values["certified"][i] <= robust <= values["attacked"][i]
        assert values["value"] == 10 * values["state"].count("robust")
        assert values["differ"] == 0
        seen |= set(values["state"])
    assert seen == {"robust", "falsified", "wrong"}


def test_what_is_not_decided_in_time_counts_as_not_proved() -> None:
    values = certified_accuracy(run(2), radius=20, seconds=0.0)
    assert len(values["clean"]) == 12
    assert "timeout" in values["state"]
    assert values["value"] == pytest.approx(100 / 12 * sum(values["certified"]))


def test_proofs_that_an_attack_disproves_are_an_error() -> None:
    row = {"clean": True, "attacked": True, "certified": True, "state": "robust"}
    check([row, row | {"certified": False, "state": "timeout"}, row | {"certified": False}])
    for change in ({"attacked": False}, {"clean": False, "attacked": True}, {"state": "falsified"}):
        with pytest.raises(ValueError, match="image 1"):
            check([row, row | change])


def test_networks_without_bounds_are_named() -> None:
    one = run(0)
    one.quantized = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 3))
    with pytest.raises(Unsupported, match="no bounds for 2"):
        certified_accuracy(one)
