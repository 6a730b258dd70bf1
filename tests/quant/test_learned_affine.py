"""Codes that are learned: the start is what was given, gradients, and what comes out are codes again."""

import pytest
import torch

from qbench.quant.encodings import Affine
from qbench.quant.learned_affine import LearnedAffine
from qbench.quant.observers import search_weight


def start(symmetric: bool, group_size: int | None = None, axis: int = 0) -> tuple[torch.Tensor, Affine]:
    torch.manual_seed(0)
    weight = torch.randn(4, 6, 3, 1) * torch.tensor([1e-3, 1.0, 0.0, 10.0])[:, None, None, None]
    weight = weight.movedim(0, axis).contiguous()
    scale, zero = search_weight(
        weight,
        bits=3,
        granularity="group" if group_size else "channel",
        group_size=group_size,
        symmetric=symmetric,
        axis=axis,
    )
    return weight, Affine.nearest(weight, scale, bits=3, zero_point=zero, axis=axis, group_size=group_size)


@pytest.mark.parametrize(("symmetric", "group_size", "axis"), [(True, None, 0), (False, None, 1), (False, 4, 0)])
def test_it_starts_with_the_given_codes(symmetric: bool, group_size: int | None, axis: int) -> None:
    weight, encoding = start(symmetric, group_size, axis)
    for value in (weight, encoding.decode()):
        learned = LearnedAffine(encoding)
        quantized = learned(value)
        torch.testing.assert_close(quantized, encoding.decode())
        again = learned.encoding(quantized)
        assert torch.equal(again.codes, encoding.codes)
        torch.testing.assert_close(again.scale, encoding.scale)
        assert (again.low, again.high, again.axis, again.group_size) == (
            encoding.low,
            encoding.high,
            axis,
            group_size,
        )


def test_gradients_pass_inside_the_range_and_steps_get_those_of_lsq() -> None:
    codes = torch.tensor([[-2, -1, 0, 1, 1]])
    learned = LearnedAffine(Affine(codes, torch.ones(1, 1), -2, 1))
    weight = torch.tensor([[-3.0, -0.6, 0.4, 0.9, 2.0]], requires_grad=True)
    learned(weight).backward(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0, 2, 3, 4, 0]]
    # dQ/ds = [-2, -.4, -.4, .1, 1] at a step of 1, whose logarithm is what is learned.
    expected = sum(g * d for g, d in zip([1, 2, 3, 4, 5], [-2, -0.4, -0.4, 0.1, 1], strict=True))
    assert learned.log_scale.grad is not None
    assert learned.log_scale.grad.item() == pytest.approx(expected, rel=1e-5)


def test_whatever_is_learned_are_codes_in_the_range() -> None:
    weight, encoding = start(symmetric=False)
    learned = LearnedAffine(encoding)
    with torch.no_grad():
        learned.log_scale += 0.3
        quantized = learned(weight + 5)
    again = learned.encoding(quantized)
    assert int(again.codes.min()) >= again.low
    assert int(again.codes.max()) <= again.high
    torch.testing.assert_close(again.decode(), quantized)


def test_what_it_can_start_from() -> None:
    _, encoding = start(symmetric=True)
    fractional = Affine(encoding.codes, encoding.scale, -3, 3, torch.full_like(encoding.scale, 0.5))
    assert LearnedAffine.accepts(encoding)
    assert not LearnedAffine.accepts(fractional)
    assert not LearnedAffine.accepts(None)
