import pytest
from pydantic import ValidationError

from qbench.quant.schedule import Schedule


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    schedule = Schedule(warmup=0.04)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[52] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0, abs=1e-12)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_it_falls_in_steps() -> None:
    schedule = Schedule(warmup=0.0, decay="step")
    factors = [schedule.factor(step, 8) for step in range(8)]
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_steps_come_before_epochs_and_time_before_both() -> None:
    assert Schedule(epochs=3).total(7) == 21
    assert Schedule(epochs=3, steps=5).total(7) == 5
    assert Schedule(epochs=3, steps=5, seconds=1.0).total(7) is None


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"ema": 1.0}, {"lr": 0.0}, {"decay": "linear"}, {"epoch": 1}])
def test_what_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Schedule.model_validate(wrong)
