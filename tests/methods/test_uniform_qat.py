"""Quantization-aware training on the scanned digits: a few steps at 4 bits keep the accuracy of the float network."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import UserError
from qbench.quant.activations import StaticQuantizer, input_quantizers
from qbench.quant.encodings import Affine, Codebook
from qbench.quant.layers import encodings
from qbench.quant.level_quantizer import LevelQuantizer
from qbench.quant.schedule import Schedule
from qbench.quant.training import fit
from qbench.registry import parse, resolve
from qbench.workspace import Workspace


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    digits, model = resolve("dataset", "digits"), resolve("model", "digits_resnet")
    return Workspace(digits, model, (64, 0), tmp_path_factory.mktemp("cache"), torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(space: Workspace) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip
    fit(model, space.data(seed=0, trains=True), Schedule(epochs=6, batch_size=32, lr=1e-2, optimizer="adamw"))
    assert right(model, space) > 0.95
    return model


def right(model: nn.Module, space: Workspace) -> float:
    images = space.images("evaluation")
    with torch.no_grad():
        answers: Tensor = model(images.batch(range(len(images)))).argmax(1)
    return (answers == torch.tensor(images.split.targets)).float().mean().item()


def train(reference: str, trained: nn.Module, space: Workspace) -> tuple[nn.Module, dict[str, Any]]:
    records: dict[str, Any] = {}
    floats = copy.deepcopy(trained).requires_grad_(False)
    data: Data = space.data(seed=0, trains=True, reference=floats, record=records.__setitem__)
    name, options = parse(reference)
    method = resolve("method", name, {"steps": 60, "batch_size": 32, **options})
    return method(copy.deepcopy(trained), data), records


CASES = {
    "ste": (Affine, StaticQuantizer),
    "dorefa": (Affine, StaticQuantizer),
    "dorefa[gradient_bits=6]": (Affine, StaticQuantizer),
    "pact": (Affine, StaticQuantizer),
    "pact[weights=sawb]": (Affine, StaticQuantizer),
    "lsq_plus": (Affine, StaticQuantizer),
    "apot_qat": (Codebook, LevelQuantizer),
    "msqe[deviations=3.5,flatten=1e-4]": (Affine, StaticQuantizer),
    "msqe[estimator=alternating,power_of_two=false,granularity=channel]": (Affine, StaticQuantizer),
    "msqe[estimator=gradient]": (Affine, StaticQuantizer),
    "msqe[estimator=gradient,power_of_two=false,momentum=0.0]": (Affine, StaticQuantizer),
    "cpq": (Affine, StaticQuantizer),
    "dropbits": (Affine, StaticQuantizer),
    "direct": (Codebook, LevelQuantizer),
}


@pytest.mark.parametrize("reference", CASES)
def test_four_bits_are_nearly_as_good_as_float(reference: str, trained: nn.Module, space: Workspace) -> None:
    model, records = train(reference, trained, space)
    assert right(model, space) > right(trained, space) - 0.03
    own = records[parse(reference)[0]]
    assert own["deployed_difference"] <= 1e-5
    assert records["oscillation"]["steps"] == 60
    encoding, quantizer = CASES[reference]
    coded, inputs = list(encodings(model).values()), list(input_quantizers(model).values())
    assert len(coded) == len(inputs) == 4
    for inner in (1, 2):
        assert isinstance(coded[inner], encoding)
        assert coded[inner].nominal_bits <= 4 * coded[inner].codes.numel()
        assert isinstance(inputs[inner], quantizer)
        assert inputs[inner].bits == 4


@pytest.mark.parametrize("reference", ["dorefa[bits=1]", "direct[bits=1,granularity=channel]"])
def test_one_bit_learns(reference: str, trained: nn.Module, space: Workspace) -> None:
    model, _ = train(f"{reference[:-1]},edge_bits=8]", trained, space)
    assert right(model, space) > 0.8
    assert [encoding.nominal_bits / encoding.codes.numel() for encoding in encodings(model).values()] == [8, 1, 1, 8]


def test_steps_of_msqe_are_powers_of_two_that_freeze(trained: nn.Module, space: Workspace) -> None:
    for estimator in ("exact", "gradient"):
        model, records = train(f"msqe[estimator={estimator},freeze=0.5,bits=3]", trained, space)
        powers = [encoding.scale.log2() for encoding in encodings(model).values()]
        assert all(torch.equal(power, power.round()) for power in powers)
        assert records["oscillation"]["exponents"].keys() == {"1", "5", "9", "14"}
        scale = records["msqe"]["state"]["5.weight.scale"]
        assert len(set(scale[len(scale) // 2 + 1 :])) == 1


def test_outliers_are_clipped(trained: nn.Module, space: Workspace) -> None:
    model, records = train("msqe[deviations=1.5,steps=5]", trained, space)
    assert sum(records["oscillation"]["error"].values()) > 0
    weight = model[5].weight
    assert weight.abs().max() < 2 * trained[5].weight.std()


def test_a_penalty_on_bits_makes_some_of_them_go(trained: nn.Module, space: Workspace) -> None:
    model, _ = train("dropbits[penalty=3.0,edge_bits=null,lr=0.05,activation_bits=null]", trained, space)
    assert min(encoding.levels for encoding in encodings(model).values()) < 16


def test_sawb_refuses_widths_without_coefficients(trained: nn.Module, space: Workspace) -> None:
    with pytest.raises(UserError, match="no coefficients for 6 bits"):
        train("pact[weights=sawb,bits=6]", trained, space)


def test_the_largest_levels_of_the_paper(trained: nn.Module, space: Workspace) -> None:
    model, _ = train("dorefa[unit=true,steps=2]", trained, space)
    assert model[5].weight.abs().max() == 1
    assert input_quantizers(model)["5"].scale.item() == pytest.approx(1 / 15)
