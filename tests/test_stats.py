import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbench.stats import paired_difference, ranks


def test_bonett_price_known_answer() -> None:
    # 50 pairs, 9 discordant one way and 3 the other: p12 = 10/52, p21 = 4/52, estimate 6/52, worked by hand.
    a = np.array([1] * 9 + [0] * 3 + [1] * 38)
    b = np.array([0] * 9 + [1] * 3 + [1] * 38)
    interval = paired_difference(a, b)
    assert interval.estimate == pytest.approx(6 / 50)
    reach = 1.959964 * np.sqrt((14 / 52 - (6 / 52) ** 2) / 52)
    assert interval.low == pytest.approx(6 / 52 - reach, abs=1e-6)
    assert interval.high == pytest.approx(6 / 52 + reach, abs=1e-6)


def test_identical_outcomes_still_have_a_width() -> None:
    interval = paired_difference(np.ones(100), np.ones(100))
    assert interval.estimate == 0
    assert interval.low < 0 < interval.high


def test_interval_keeps_its_level() -> None:
    rng = np.random.default_rng(0)
    truth = 0.10 - 0.04
    hits = 0
    for _ in range(2000):
        u = rng.random(300)
        a, b = (u < 0.10).astype(int), ((u > 0.5) & (u < 0.54)).astype(int)
        interval = paired_difference(a, b)
        hits += interval.low <= truth <= interval.high
    assert 0.93 <= hits / 2000 <= 0.975


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_swapping_the_two_mirrors_the_interval(pairs: list[tuple[bool, bool]]) -> None:
    a, b = np.array(pairs).T
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert forth.low == pytest.approx(-back.high)
    assert forth.low <= forth.high


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_difference(np.ones(3), np.ones(4))


def test_ranks_show_ties() -> None:
    values = [0.90, 0.89, 0.70, 0.50]
    assert ranks(values, lambda i, j: values[i] - values[j] > 0.05) == ["1=", "1=", "3", "4"]
    assert ranks(values, lambda i, j: True) == ["1", "2", "3", "4"]
    assert ranks(values, lambda i, j: False) == ["1="] * 4
