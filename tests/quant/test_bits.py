"""Codes survive packing at every width, and take the space that they should."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench.quant import bits


@st.composite
def codes_and_width(draw):
    width = draw(st.integers(1, 16))
    return draw(st.lists(st.integers(0, 2**width - 1), max_size=70)), width


@given(codes_and_width())
def test_round_trip(case):
    codes, width = case
    packed = bits.pack(torch.tensor(codes, dtype=torch.int32), width)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-len(codes) * width // 8)
    assert bits.unpack(packed, width, len(codes)).tolist() == codes


@pytest.mark.parametrize("width", range(1, 17))
def test_round_trip_over_chunks(width, monkeypatch):
    monkeypatch.setattr(bits, "_CHUNK", 64)
    codes = torch.from_numpy(np.random.default_rng(width).integers(0, 2**width, 1001))
    assert torch.equal(bits.unpack(bits.pack(codes.reshape(7, 143), width), width, 1001), codes.int())


def test_least_significant_bit_first():
    assert bits.pack(torch.tensor([1, 2, 3]), 3).tolist() == [0b11_010_001, 0b0]
    assert bits.pack(torch.tensor([0x1234]), 16).tolist() == [0x34, 0x12]


@pytest.mark.parametrize("codes", [[-1], [8], [0, 70000]])
def test_codes_that_do_not_fit(codes):
    with pytest.raises(ValueError, match="do not fit 3 bits"):
        bits.pack(torch.tensor(codes), 3)


@pytest.mark.parametrize("width", [0, 17, -1])
def test_impossible_width(width):
    with pytest.raises(ValueError, match="1 to 16"):
        bits.pack(torch.tensor([0]), width)


@pytest.mark.parametrize(("levels", "width"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (17, 5), (65536, 16)])
def test_width_of_levels(levels, width):
    assert bits.width_of(levels) == width
