"""Training for intervals: what is proved grows, and what was trained is what is deployed."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data, Training
from qbench.errors import Unsupported
from qbench.methods.lsq import lsq
from qbench.methods.qa_ibp import qa_ibp
from qbench.metrics.certified_accuracy import certified_accuracy
from qbench.models.base import Preprocess, cross_entropy
from qbench.quant.activations import StaticQuantizer, input_quantizers
from qbench.quant.layers import encodings
from qbench.quant.schedule import Schedule
from qbench.quant.training import fit
from qbench.registry import resolve
from qbench.verify.classifier import Classifier, Pixels
from qbench.workspace import Workspace

PREPROCESS = Preprocess((8, 8), mean=(0.5,), std=(0.5,))


class Halves:
    """8x8 images; the class says which half is brighter, by 40 grey levels."""

    def __init__(self, images: int = 96) -> None:
        generator = torch.Generator().manual_seed(5)
        self.targets = [i % 4 for i in range(images)]
        self.levels = torch.randint(60, 180, (images, 1, 8, 8), generator=generator)
        for i, target in enumerate(self.targets):
            half = [slice(0, 4), slice(4, 8), slice(None), slice(None)]
            self.levels[i, 0, half[target], half[(target + 2) % 4]] += 40

    def __len__(self) -> int:
        return len(self.levels)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return PREPROCESS.normalize(self.levels[list(positions)])


def make_data(preprocess: Preprocess | None = PREPROCESS) -> tuple[Data, Halves, dict[str, Any]]:
    halves, records, cpu = Halves(), {}, torch.device("cpu")
    training = Training(halves, halves.targets, cpu, None)
    batches = Batches(halves, cpu, 32)
    data = Data(batches, training, cross_entropy, preprocess=preprocess, record=records.__setitem__)
    return data, halves, records


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.0), nn.Flatten(),
        nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip
    return fit(model, make_data()[0], Schedule(epochs=20, batch_size=32, lr=1e-2, optimizer="adamw"))


def proved(model: nn.Module, halves: Halves, radius: int) -> float:
    margins = Classifier.of(model, PREPROCESS).margins(
        Pixels.around(halves.levels, radius), torch.tensor(halves.targets)
    )
    return (margins > 0).all(1).float().mean().item()


def test_much_more_is_proved_than_after_other_training(trained: nn.Module) -> None:
    data, halves, records = make_data()
    schedule = Schedule(epochs=30, batch_size=32, lr=3e-3, optimizer="adamw", freeze_bn=0.0)
    model = qa_ibp(copy.deepcopy(trained), data, radius=8.0, schedule=schedule)
    usual = lsq(copy.deepcopy(trained), make_data()[0], bits=8, activation_bits=8, schedule=schedule)
    assert proved(model, halves, 6) > 0.8
    assert proved(usual, halves, 6) < 0.6
    assert records["qa_ibp"]["deployed_difference"] == 0
    assert {q.symmetric for q in input_quantizers(model).values()} == {True, False}
    assert all(type(q) is StaticQuantizer for q in input_quantizers(model).values())
    assert set(encodings(model)) == {"0.weight", "5.weight", "7.weight"}


def test_the_loss_is_that_of_the_paper(trained: nn.Module) -> None:
    """By hand, on a single layer whose margins are known."""
    from qbench.methods.qa_ibp import _Box, _Robust

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    _, halves, _ = make_data()
    x, y = halves.batch(range(8)), torch.tensor(halves.targets[:8])
    box = _Box.of(PREPROCESS, 2.0, torch.device("cpu"))
    for correct_only in (True, False):
        robust = _Robust(cross_entropy, box, 0.5, 0.001, 0.2, correct_only)
        assert robust(model, x, y).item() == pytest.approx(cross_entropy(model(x), y).item())
        robust.see(SimpleNamespace(done=0.45))
        outputs, lacking = model(x), []
        radius = 0.5 * 2.1 / 127.5
        for i, target in enumerate(y.tolist()):
            for k in set(range(4)) - {target}:
                row = model[1].weight[target] - model[1].weight[k]
                low = outputs[i, target] - outputs[i, k] - radius * row.abs().sum()
                counts = not correct_only or int(outputs[i].argmax()) == target
                lacking.append(max(0.2 - low.item(), 0) * counts)
        wanted = cross_entropy(outputs, y).item() + 0.5 * 0.5 * sum(lacking) / 4 / 8
        assert robust(model, x, y).item() == pytest.approx(wanted, rel=1e-5)
    robust.see(SimpleNamespace(done=0.95))
    assert robust.share == 1


def test_boxes_end_at_black_and_white() -> None:
    from qbench.methods.qa_ibp import _Box

    box = _Box.of(dataclasses.replace(PREPROCESS, std=(0.25,)), 9.9, torch.device("cpu"))
    found = box.around(torch.tensor([-2.0, 0.0, 1.9]).view(1, 1, 1, 3), 1.0)
    radius = 10 / 255 / 0.25
    assert found.low.flatten().tolist() == pytest.approx([-2.0, -radius, 1.9 - radius])
    assert found.high.flatten().tolist() == pytest.approx([-2.0 + radius, radius, 2.0])


def test_what_it_cannot_train_is_refused_before_training(trained: nn.Module) -> None:
    data, _, records = make_data()
    with pytest.raises(Unsupported, match=r"no bounds for 1 \(GELU\)"):
        qa_ibp(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), data)
    with pytest.raises(Unsupported, match="what a grey level is"):
        qa_ibp(copy.deepcopy(trained), make_data(None)[0])
    assert not records
    with pytest.raises(Unsupported, match=r"1 \(BatchNorm2d in training mode\)"):
        qa_ibp(copy.deepcopy(trained), data, schedule=Schedule(steps=2, freeze_bn=None))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_digits(tmp_path: Path) -> None:
    """From the weights that ship with the package, at the radii of the paper."""
    space = Workspace(
        resolve("dataset", "digits"), resolve("model", "digits_cnn"), (64, 0), tmp_path, torch.device("cpu")
    )
    shares: dict[str, list[float]] = {}
    for method in (lsq, qa_ibp):
        torch.manual_seed(0)
        options = {"activation_bits": 8} if method is lsq else {}
        model = method(space.model.load(), space.data(seed=0, trains=True), bits=8, **options)
        images = space.images("evaluation")
        with torch.no_grad():
            right = model(images.batch(range(50))).argmax(1) == torch.tensor(images.split.targets[:50])
        finished = SimpleNamespace(
            model=space.model,
            quantized=model,
            images=images,
            outcomes={"correct": right.numpy()},
            data=space.data(seed=0, trains=False),
        )
        values = [certified_accuracy(finished, radius=radius, seconds=0.0) for radius in (1, 4)]
        shares[method.__name__] = [each["value"] for each in values]
    assert max(shares["lsq"]) < 10
    assert shares["qa_ibp"][0] > 80
    assert shares["qa_ibp"][1] > 50
