import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data, Training
from qbench.models.base import cross_entropy
from qbench.quant.distillation import divergence
from qbench.quant.schedule import Schedule
from qbench.quant.training import Step, decay_groups, fit


class Blobs:
    """Images whose brightest quadrant is their class."""

    def __init__(self, images: int = 64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.targets = [i % 4 for i in range(images)]
        self.images = torch.randn(images, 3, 8, 8, generator=generator)
        for i, target in enumerate(self.targets):
            row, column = divmod(target, 2)
            self.images[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.5

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.images[list(positions)]


def make_data(seed: int = 0, reference: nn.Module | None = None) -> tuple[Data, dict[str, Any]]:
    blobs, records = Blobs(), {}
    cpu = torch.device("cpu")
    training = Training(blobs, blobs.targets, cpu, lambda x, y, g: (x + 0.1 * torch.randn(x.shape, generator=g), y))
    data = Data(
        Batches(blobs, cpu), training, cross_entropy, seed=seed, reference=reference, record=records.__setitem__
    )
    return data, records


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, 4),
    )


def schedule(**options: Any) -> Schedule:
    return Schedule(**{"optimizer": "adamw", "lr": 1e-3, "batch_size": 16, "weight_decay": 0.0} | options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(optimizer: Any) -> None:
    def trained(seed: int, reference: nn.Module | None = None) -> nn.Module:
        data, _ = make_data(seed, reference)
        return fit(network(), data, schedule(epochs=2, optimizer=optimizer))

    first = trained(0)
    assert same(first, trained(0))
    assert same(first, trained(0, reference=network())), "timing the float network must not change the training"
    assert not same(first, trained(1))


def test_the_loss_falls_and_everything_is_recorded() -> None:
    data, records = make_data(reference=network().eval())
    model = fit(network(), data, schedule(epochs=8, lr=1e-2), timing_steps=5)
    assert not any(module.training for module in model.modules())
    record = records["training"]
    assert len(record["loss"]) == len(record["seconds"]) == len(record["loading_seconds"]) == 8 * 4
    assert record["steps_per_epoch"] == 4
    assert sum(record["loss"][-4:]) < 0.5 * sum(record["loss"][:4])
    timing = record["timing"]
    assert len(timing["quantized"]) == len(timing["float"]) == 5
    assert min(timing["float"]) > 0
    assert timing["saved_bytes"]["quantized"] == timing["saved_bytes"]["float"] > 16 * 3 * 8 * 8 * 4


def test_the_reference_is_not_changed_and_global_random_numbers_are_not_consumed() -> None:
    reference = network().eval()
    before = copy.deepcopy(reference)
    data, _ = make_data(reference=reference)
    state = torch.get_rng_state()
    fit(network(), data, schedule(steps=5))
    assert same(reference, before)
    assert not reference.training
    assert torch.equal(state, torch.get_rng_state())


def test_one_step_of_sgd_is_the_textbook_one() -> None:
    data, _ = make_data()
    model, by_hand = network(), network()
    model[5] = by_hand[5] = nn.Identity()
    fit(model, data, schedule(steps=1, lr=0.5, optimizer="sgd", weight_decay=0.1, warmup=0.0))
    x, y = next(iter(data.train.epoch(0, batch_size=16, seed=0)))
    cross_entropy(by_hand.train()(x), y).backward()
    for own, hand in zip(model.parameters(), by_hand.parameters(), strict=True):
        decay = 0.1 if hand.dim() >= 2 else 0.0
        torch.testing.assert_close(own, hand - 0.5 * (hand.grad + decay * hand))


def test_batch_norm_statistics_freeze_on_time() -> None:
    data, _ = make_data()
    seen: list[Tensor] = []

    def note(step: Step) -> None:
        seen.append(step.model.get_buffer("1.running_mean").clone())

    fit(network(), data, schedule(steps=8, freeze_bn=0.5), on_step=note)
    assert not torch.equal(seen[2], seen[3])
    assert all(torch.equal(mean, seen[3]) for mean in seen[4:])


def test_clipping_bounds_the_step() -> None:
    data, _ = make_data()
    model, before = network(), network()
    fit(model, data, schedule(steps=1, lr=1.0, optimizer="sgd", warmup=0.0, clip=0.01))
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_groups_and_objective_replace_the_common_ones() -> None:
    data, records = make_data()
    model, before = network(), network()
    fit(
        model,
        data,
        schedule(steps=3),
        groups=lambda net: [{"params": [net[6].weight], "lr": 1e-2}],
        objective=lambda net, x, y: net(x).square().mean(),
    )
    assert not torch.equal(model[6].weight, before[6].weight)
    assert torch.equal(model[0].weight, before[0].weight)
    assert [len(group["params"]) for group in decay_groups(model.parameters(), 0.1)] == [2, 4]
    assert records["training"]["timing"] == {}


def test_time_ends_a_training() -> None:
    data, records = make_data()
    done: list[float] = []
    fit(network(), data, schedule(seconds=0.2), on_step=lambda step: done.append(step.done))
    record = records["training"]
    spent = [a + b for a, b in zip(record["seconds"], record["loading_seconds"], strict=True)]
    assert sum(spent[:-1]) < 0.2 <= sum(spent)
    assert done == sorted(done)
    assert done[-1] == 1


def test_the_end_is_a_moving_average() -> None:
    data, _ = make_data()
    seen: list[Tensor] = []
    model = fit(network(), data, schedule(steps=4, ema=0.3), on_step=lambda s: seen.append(s.model[6].weight.clone()))
    expected = network()[6].weight.detach()
    for number, weight in enumerate(seen, start=1):
        share = min(0.3, (1 + number) / (10 + number))
        expected = share * expected + (1 - share) * weight.detach()
    torch.testing.assert_close(model[6].weight.detach(), expected)
    assert not torch.equal(seen[-1], expected)


def test_distillation_learns_the_answers_of_the_float_network_whatever_the_objective() -> None:
    teacher, student = network().eval(), network()
    with torch.no_grad():
        student[6].weight.zero_()
    data, _ = make_data(reference=teacher)
    x = data.calibration.source.batch(range(64))
    apart = divergence(student.eval()(x), teacher(x))
    fit(
        student,
        data,
        schedule(epochs=10, lr=1e-2, distillation=1.0),
        objective=lambda net, x, y: net(x).sum() * 1e6,
    )
    assert divergence(student(x), teacher(x)) < 0.3 * apart


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    data, _ = make_data()
    with pytest.raises(FloatingPointError, match="at step 0"):
        fit(network(), data, schedule(epochs=1), objective=lambda net, x, y: net(x).sum() * float("nan"))
