"""A training that is broken off goes on as if nothing had happened."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data, Training
from qbench.errors import UserError
from qbench.methods.bitat import bitat
from qbench.methods.deep_compression import deep_compression
from qbench.methods.lsq import lsq
from qbench.models.base import cross_entropy
from qbench.quant.checkpoints import Checkpoints
from qbench.quant.schedule import Schedule
from qbench.quant.training import Step, fit
from qbench.registry import parse, resolve


class Noise:
    def __init__(self) -> None:
        self.images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.images[list(positions)]


class BrokenOffError(Exception):
    pass


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QBENCH_CHECKPOINT_SECONDS", "0")


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(128, 4),
    )  # fmt: skip


def make_data(folder: Path | None, broken_at: float = 2) -> tuple[Data, dict[str, Any]]:
    """A run that breaks off when that share of a training is done."""
    noise, cpu, records = Noise(), torch.device("cpu"), {}

    def progress(done: float) -> None:
        if done >= broken_at:
            raise BrokenOffError

    def vary(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return x + 0.1 * torch.randn(x.shape, generator=generator), y

    data = Data(
        Batches(noise, cpu),
        Training(noise, [i % 4 for i in range(40)], cpu, vary),
        cross_entropy,
        reference=network().eval(),
        checkpoints=None if folder is None else Checkpoints(folder),
        progress=progress,
        record=records.__setitem__,
    )
    return data, records


def plain(data: Data) -> nn.Module:
    return fit(network(), data, Schedule(steps=12, batch_size=16, ema=0.9, optimizer="adamw", clip=1.0, freeze_bn=0.6))


def quantized(data: Data) -> nn.Module:
    return lsq(network(), data, bits=2, activation_bits=2, schedule=Schedule(steps=12, batch_size=16))


def twice(data: Data) -> nn.Module:
    return fit(plain(data), data, Schedule(steps=4, batch_size=16))


def layer_by_layer(data: Data) -> nn.Module:
    return bitat(network(), data, edge_bits=None, schedule=Schedule(steps=12, batch_size=16, distillation=0.5))


def pruned(data: Data) -> nn.Module:
    return deep_compression(network(), data, bits=2, schedule=Schedule(steps=12, batch_size=16))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("train", [plain, quantized, twice, layer_by_layer, pruned])
def test_a_broken_training_goes_on_to_the_same_weights(train: Callable[[Data], nn.Module], tmp_path: Path) -> None:
    data, whole = make_data(None)
    expected = train(data)
    for broken_at in (0.3, 0.7):
        with pytest.raises(BrokenOffError):
            train(make_data(tmp_path, broken_at)[0])
    data, records = make_data(tmp_path)
    assert same(train(data), expected)
    assert data.checkpoints is not None
    assert data.checkpoints.seconds > 0
    assert records["training"]["loss"] == whole["training"]["loss"]
    if train is not twice:
        assert records["training"]["resumed_at"] == [4, 9]
    if train is quantized:
        assert records["lsq"] == whole["lsq"]


@pytest.mark.parametrize(
    "reference",
    [
        "ste",
        "dorefa[bits=1,gradient_bits=4]",
        "pact[weights=sawb]",
        "lsq_plus",
        "apot_qat",
        "msqe[bits=2,freeze=0.5,momentum=0.5]",
        "msqe[bits=2,estimator=gradient,freeze=0.5,deviations=2.0,flatten=0.01]",
        "dropbits[penalty=0.1,fix=0.5]",
        "direct[bits=2]",
    ],
)
def test_quantizers_go_on_as_they_were(reference: str, tmp_path: Path) -> None:
    name, options = parse(reference)
    method = resolve("method", name, {**options, "steps": 10, "batch_size": 16})
    data, whole = make_data(None)
    expected = method(network(), data)
    for broken_at in (0.3, 0.7):
        with pytest.raises(BrokenOffError):
            method(network(), make_data(tmp_path, broken_at)[0])
    data, records = make_data(tmp_path)
    assert same(method(network(), data), expected)
    assert records["training"]["resumed_at"] == [3, 7]
    assert records[name] == whole[name]
    assert records["oscillation"] == whole["oscillation"]


def test_a_training_that_was_done_is_not_gone_on_with(tmp_path: Path) -> None:
    expected = plain(make_data(None)[0])
    with pytest.raises(BrokenOffError):
        plain(make_data(tmp_path, 1)[0])
    data, records = make_data(tmp_path)
    assert same(plain(data), expected)
    assert len(records["training"]["loss"]) == 12


def test_what_steps_remember_is_kept(tmp_path: Path) -> None:
    def train(data: Data) -> list[float]:
        memory: dict[str, Any] = {"losses": []}

        def note(step: Step) -> None:
            memory["losses"].append(step.loss)

        fit(network(), data, Schedule(steps=6, batch_size=16), on_step=note, memory=memory)
        losses: list[float] = memory["losses"]
        return losses

    with pytest.raises(BrokenOffError):
        train(make_data(tmp_path, 0.5)[0])
    data, records = make_data(tmp_path)
    assert train(data) == records["training"]["loss"]
    assert len(records["training"]["loss"]) == 6


def test_an_objective_that_changes_with_the_steps_goes_on_as_it_was(tmp_path: Path) -> None:
    def train(data: Data) -> nn.Module:
        shares = [0.0]

        def objective(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(net(x), y) + shares[0] * net(x).square().mean()

        def anneal(step: Step) -> None:
            shares[0] = step.done

        return fit(network(), data, Schedule(steps=8, batch_size=16), objective=objective, on_step=anneal)

    expected = train(make_data(None)[0])
    with pytest.raises(BrokenOffError):
        train(make_data(tmp_path, 0.5)[0])
    assert same(train(make_data(tmp_path)[0]), expected)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    checkpoint = Checkpoints(tmp_path / "run").next()
    assert checkpoint.load() is None
    state = {"numbers": torch.arange(3), "list": [1, 2.5, "text", None]}
    checkpoint.save(state)

    class Unsavable:
        def __reduce__(self) -> Any:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"numbers": Unsavable()})
    found = checkpoint.load()
    assert found is not None
    assert torch.equal(found["numbers"], state["numbers"])
    assert found["list"] == state["list"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["1.pt"]


def test_nothing_is_written_before_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QBENCH_CHECKPOINT_SECONDS", "1000")
    plain(make_data(tmp_path / "run")[0])
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("QBENCH_CHECKPOINT_SECONDS", "often")
    with pytest.raises(UserError, match="QBENCH_CHECKPOINT_SECONDS='often' is not a number"):
        Checkpoints(tmp_path)
