import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data, Training
from qbench.errors import UserError
from qbench.models.base import cross_entropy
from qbench.quant.training import Step, cosine, decay_groups, fit


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


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(optimizer: Any) -> None:
    def trained(seed: int, reference: nn.Module | None = None) -> nn.Module:
        data, _ = make_data(seed, reference)
        return fit(network(), data, epochs=2, batch_size=16, optimizer=optimizer)

    first = trained(0)
    assert same(first, trained(0))
    assert same(first, trained(0, reference=network())), "timing the float network must not change the training"
    assert not same(first, trained(1))


def test_the_loss_falls_and_everything_is_recorded() -> None:
    data, records = make_data(reference=network().eval())
    model = fit(network(), data, epochs=8, batch_size=16, lr=1e-2, timing_steps=5)
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
    fit(network(), data, steps=5, batch_size=16)
    assert same(reference, before)
    assert not reference.training
    assert torch.equal(state, torch.get_rng_state())


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [cosine(step, 100, 4) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[52] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0, abs=1e-12)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_one_step_of_sgd_is_the_textbook_one() -> None:
    data, _ = make_data()
    model, by_hand = network(), network()
    model[5] = by_hand[5] = nn.Identity()
    fit(model, data, steps=1, batch_size=16, lr=0.5, optimizer="sgd", weight_decay=0.1, warmup=0.0)
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

    fit(network(), data, steps=8, batch_size=16, freeze_bn=0.5, on_step=note)
    assert not torch.equal(seen[2], seen[3])
    assert all(torch.equal(mean, seen[3]) for mean in seen[4:])


def test_clipping_bounds_the_step() -> None:
    data, _ = make_data()
    model, before = network(), network()
    fit(model, data, steps=1, batch_size=16, lr=1.0, optimizer="sgd", warmup=0.0, clip=0.01)
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_groups_and_objective_replace_the_common_ones() -> None:
    data, records = make_data()
    model, before = network(), network()
    fit(
        model,
        data,
        steps=3,
        batch_size=16,
        groups=lambda net: [{"params": [net[6].weight], "lr": 1e-2}],
        objective=lambda net, x, y: net(x).square().mean(),
    )
    assert not torch.equal(model[6].weight, before[6].weight)
    assert torch.equal(model[0].weight, before[0].weight)
    assert [len(group["params"]) for group in decay_groups(model.parameters(), 0.1)] == [2, 4]
    assert records["training"]["timing"] == {}


def test_epochs_or_steps_but_not_both() -> None:
    data, _ = make_data()
    with pytest.raises(UserError, match="either epochs or steps"):
        fit(network(), data)
    with pytest.raises(UserError, match="either epochs or steps"):
        fit(network(), data, epochs=1, steps=1)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    data, _ = make_data()
    with pytest.raises(FloatingPointError, match="at step 0 of 4"):
        fit(network(), data, epochs=1, batch_size=16, objective=lambda net, x, y: net(x).sum() * float("nan"))
