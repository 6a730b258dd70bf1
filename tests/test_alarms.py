"""Which recipes are finer than which."""

from typing import Any

import pytest

from qbench import registry
from qbench.alarms import finer


def steps(recipe: str) -> list[tuple[str, Any]]:
    """As a result's identity has them: with the defaults filled in."""
    made = [registry.resolve("method", *registry.parse(step)) for step in recipe.split(" + ")]
    return [(step.name, dict(step.options)) for step in made]


@pytest.mark.parametrize(
    ("fine", "coarse", "how"),
    [
        ("rtn[bits=8]", "rtn[bits=6]", "more bits"),
        ("rtn", "rtn[bits=6]", "more bits"),
        ("rtn[bits=8,edge_bits=8]", "rtn[bits=4,edge_bits=8]", "more bits"),
        ("rtn[bits=8]", "rtn[bits=4,edge_bits=8]", "more bits"),
        ("rtn[bits=4,edge_bits=32]", "rtn[bits=4]", "more bits"),
        ("rtn[bits=4,edge_bits=8]", "rtn[bits=4]", "more bits"),
        ("rtn[bits=4] + activations[bits=8]", "rtn[bits=4] + activations[bits=4]", "more bits"),
        ("rtn[bits=8] + activations[bits=8]", "rtn[bits=4] + activations[bits=4]", "more bits"),
        ("fold_bn + rtn[bits=8] + bias_correct", "fold_bn + rtn[bits=4] + bias_correct", "more bits"),
        ("lsq[activation_bits=null]", "lsq[activation_bits=8]", "more bits"),
        ("cast[dtype=float16]", "cast[dtype=float8_e4m3]", "more bits"),
        ("mx[format=mxfp6_e3m2]", "mx[format=nvfp4]", "more bits"),
        ("mx[edge_bits=8]", "mx", "more bits"),
        ("gpfq[levels=16]", "gpfq[levels=15]", "more levels"),
        ("rtn[granularity=channel]", "rtn[granularity=tensor]", "finer granularity"),
        ("rtn[granularity=group]", "rtn[granularity=channel]", "finer granularity"),
        ("gpfq[granularity=channel]", "gpfq[granularity=layer]", "finer granularity"),
        ("kmeans[granularity=layer]", "kmeans[granularity=network]", "finer granularity"),
        (
            "activations[mode=dynamic,granularity=token]",
            "activations[mode=dynamic,granularity=tensor]",
            "finer granularity",
        ),
        ("gptq[granularity=group,group_size=32]", "gptq[granularity=group,group_size=64]", "finer granularity"),
        ("nf4[block_size=32]", "nf4[block_size=64]", "finer granularity"),
        ("rtn[bits=8,granularity=channel]", "rtn[bits=4,granularity=tensor]", "more bits and finer granularity"),
        ("split_channels[bits=8] + rtn[bits=8]", "split_channels[bits=4] + rtn[bits=4]", "more bits"),
    ],
)
def test_finer(fine: str, coarse: str, how: str) -> None:
    assert finer(steps(fine), steps(coarse)) == how
    assert finer(steps(coarse), steps(fine)) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rtn[bits=8]", "rtn[bits=8]"),
        ("rtn[bits=8]", "kmeans[bits=4]"),
        ("rtn[bits=8]", "rtn[bits=4] + activations"),
        ("fold_bn + equalize + rtn[bits=8]", "equalize + fold_bn + rtn[bits=4]"),
        ("rtn[bits=8,calibration=mse]", "rtn[bits=4]"),
        ("rtn[bits=8] + activations[bits=4]", "rtn[bits=4] + activations[bits=8]"),
        ("rtn[bits=8,granularity=tensor]", "rtn[bits=4,granularity=channel]"),
        ("rtn[bits=6]", "rtn[bits=4,edge_bits=8]"),
        ("cast[dtype=float16]", "cast[dtype=bfloat16]"),
        ("gpfq[levels=16]", "gpfq"),
        ("prune[granularity=layer]", "prune[granularity=network]"),
        ("split_channels[bits=8] + rtn", "split_channels[bits=4] + rtn"),
    ],
)
def test_not_comparable(one: str, other: str) -> None:
    assert finer(steps(one), steps(other)) is None
    assert finer(steps(other), steps(one)) is None
