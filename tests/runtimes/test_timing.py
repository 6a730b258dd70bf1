"""Calls are timed side by side."""

from __future__ import annotations

import time

from qbench.runtimes.timing import interleave


def test_the_order_rotates_and_each_round_has_one_sample_of_each() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: (order.append(name), time.sleep(0.003))) for name in "abc"}
    loops, times = interleave(calls, samples=6, warmup=1, seconds=60)
    assert loops == 1
    assert {name: len(series) for name, series in times.items()} == {"a": 6, "b": 6, "c": 6}
    assert "".join(order) == "abc" + "abcbcacab" * 2


def test_short_calls_are_repeated_within_a_sample() -> None:
    loops, times = interleave({"a": lambda: time.sleep(0.0002)}, samples=5, warmup=3, seconds=60)
    assert loops > 2
    assert all(0.0001 < s < 0.002 for s in times["a"][1:3])


def test_the_budget_ends_the_rounds() -> None:
    _, times = interleave({"a": lambda: time.sleep(0.01)}, samples=1000, warmup=1, seconds=0.1)
    assert 5 <= len(times["a"]) < 30
