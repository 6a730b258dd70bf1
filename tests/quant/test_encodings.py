"""Every encoding decodes what it encoded, and is restored from its tensors and its description."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qbench.quant.encodings import (
    Affine,
    Cast,
    Codebook,
    Rotated,
    Sum,
    VectorCodebook,
    code_range,
    from_rows,
    move,
    restore,
    to_rows,
)
from qbench.quant.layers import clear_encodings, encode, encodings, select_layers

shapes = st.sampled_from([(1,), (5,), (3, 4), (4, 1), (2, 3, 3, 3), (6, 1, 3, 3), (1, 7)])


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def restored(encoding):
    tensors = {key: value.clone() for key, value in encoding.tensors().items()}
    return restore(json.loads(json.dumps(encoding.meta())), tensors)


def same(encoding):
    a, b = encoding.decode(), restored(encoding).decode()
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


@given(shapes, st.integers(0, 3), st.integers(0, 9))
def test_rows_are_undone(shape, axis, seed):
    weight = random(shape, seed)
    axis = axis % len(shape)
    rows = to_rows(weight, axis)
    assert rows.shape == (shape[axis], weight.numel() // shape[axis])
    assert torch.equal(from_rows(rows, weight.shape, axis), weight)


@settings(deadline=None)
@given(
    shape=shapes,
    bits=st.integers(1, 16),
    asymmetric=st.booleans(),
    group_size=st.sampled_from([None, 1, 2, 5, 100]),
    axis=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_affine(shape, bits, asymmetric, group_size, axis, seed):
    weight = random(shape, seed)
    axis = axis % len(shape)
    rows = to_rows(weight, axis)
    groups = 1 if group_size is None else -(-rows.shape[1] // group_size)
    scale = 0.01 + random((rows.shape[0], groups), seed + 1).abs()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if asymmetric else None
    code = Affine.nearest(weight, scale, bits=bits, zero_point=zero, axis=axis, group_size=group_size)
    low, high = code_range(bits, symmetric=not asymmetric)
    assert low <= code.codes.min() <= code.codes.max() <= high
    assert same(code)
    # Inside the range no weight is further than half a step away.
    wide = scale.repeat_interleave(group_size or rows.shape[1], dim=1)[:, : rows.shape[1]]
    offset = zero[:, :1] if zero is not None else 0
    inside = (rows / wide + offset >= low) & (rows / wide + offset <= high)
    error = (to_rows(code.decode(), axis) - rows).abs()
    assert (error <= wide * 0.5001 + 1e-6)[inside].all()
    # Rounding what is on the grid changes nothing.
    again = Affine.nearest(code.decode(), scale, bits=bits, zero_point=zero, axis=axis, group_size=group_size)
    assert torch.equal(again.codes, code.codes)


@settings(deadline=None)
@given(st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_rounding_keeps_the_order(bits, asymmetric, seed):
    row = random((1, 50), seed).sort().values
    zero = torch.tensor([2.0 ** (bits - 1)]) if asymmetric else None
    for code in (Affine.nearest(row, 0.2, bits=bits, zero_point=zero), Codebook.nearest(row, random((bits,), seed))):
        assert (code.decode().diff() >= 0).all()


def test_affine_ties_go_to_even():
    code = Affine.nearest(torch.tensor([[0.5, 1.5, -0.5, 2.5]]), 1.0, bits=4)
    assert code.codes.tolist() == [[0, 2, 0, 2]]


def test_a_zero_point_does_not_change_the_rounding():
    weight = random((8, 64)) * 3
    plain = Affine.nearest(weight, 1.0, low=-20, high=20)
    assert torch.equal(Affine.nearest(weight, 1.0, bits=16, zero_point=32767.0).decode(), plain.decode())
    ties = torch.tensor([[0.5, 1.5, -0.5, 2.5]])
    assert Affine.nearest(ties, 1.0, bits=4, zero_point=3.0).decode().tolist() == [[0, 2, 0, 2]]
    between = Affine.nearest(ties, 1.0, bits=4, zero_point=3.4)
    assert between.codes.tolist() == [[4, 5, 3, 6]]


def test_affine_of_dead_channels():
    code = Affine.nearest(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), torch.tensor([0.0, 1.0]), bits=8)
    assert torch.equal(code.decode(), torch.tensor([[0.0, 0.0], [1.0, -1.0]]))


def test_affine_nominal_bits_count_levels():
    code = Affine.nearest(torch.zeros(4, 8), 1.0, low=-4, high=4)
    assert code.nominal_bits == pytest.approx(32 * math.log2(9))
    assert code.tensors()["codes"].numel() == 32 * 4 // 8


@settings(deadline=None)
@given(
    shape=shapes,
    k=st.integers(1, 20),
    per=st.sampled_from(["tensor", "channel", "group"]),
    scaled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_codebook_picks_the_nearest_level(shape, k, per, scaled, seed):
    weight = random(shape, seed)
    rows = to_rows(weight)
    n, d = rows.shape
    size = 3 if per == "group" else None
    groups = -(-d // 3) if per == "group" else 1
    levels = random((k,) if per == "tensor" else (n, groups, k), seed + 1)
    scale = 0.5 + random((n, 1), seed + 2).abs() if scaled and per != "group" else None
    code = Codebook.nearest(weight, levels, scale=scale, group_size=size)
    assert same(code)
    per_weight = levels.expand(n, d, k) if per == "tensor" else levels.repeat_interleave(size or d, dim=1)[:, :d]
    per_weight = per_weight if scale is None else per_weight * scale[:, :, None]
    best = (per_weight - rows[:, :, None]).abs().amin(2)
    assert torch.allclose((to_rows(code.decode()) - rows).abs(), best, atol=1e-6)


def test_codebook_shares_levels_between_scaled_groups():
    weight = random((4, 10))
    levels = torch.tensor([-1.0, -0.3, 0.0, 0.3, 1.0])
    blocks = torch.nn.functional.pad(weight, (0, 2)).reshape(4, 3, 4)
    code = Codebook.nearest(weight, levels, scale=blocks.abs().amax(2), group_size=4)
    assert code.levels.shape == (1, 1, 5)
    assert same(code)
    assert (code.decode() - weight).abs().max() <= 0.35 * weight.abs().max()


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 40), st.integers(0, 9))
def test_vector_codebook(n, d, k, seed):
    weight = random((n, d), seed)
    g = 2
    centroids = random((k, g), seed + 1)
    codes = torch.randint(0, k, (n, -(-d // g)), generator=torch.Generator().manual_seed(seed))
    code = VectorCodebook(codes, centroids, tuple(weight.shape))
    assert same(code)
    assert torch.equal(code.decode(), centroids[codes].reshape(n, -1)[:, :d])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_cast(dtype):
    weight = random((3, 5))
    code = Cast(weight.to(dtype))
    assert same(code)
    assert torch.equal(code.decode(), weight.to(dtype).float())


def test_sum_and_rotated_nest():
    weight = random((4, 6))
    first = Affine.nearest(weight, weight.abs().amax(1) / 7, bits=4)
    second = Codebook.nearest(weight - first.decode(), torch.tensor([-0.1, 0.0, 0.1]))
    total = Sum((first, second))
    assert same(total)
    assert torch.equal(total.decode(), first.decode() + second.decode())
    assert total.nominal_bits == first.nominal_bits + second.nominal_bits
    matrix = torch.linalg.qr(random((6, 6), 3)).Q
    rotated = Rotated(total, matrix)
    assert same(rotated)
    assert torch.allclose(rotated.decode(), total.decode() @ matrix.T)


def test_move_takes_every_tensor_along():
    weight = random((4, 6))
    code = Sum((Affine.nearest(weight, 0.1, bits=4), Codebook.nearest(weight, random((4,)), scale=1.0)))
    assert torch.equal(move(code, "cpu").decode(), code.decode())
    first, second = move(code, "meta").parts
    moved = (first.codes, first.scale, second.codes, second.levels, second.scale)
    assert all(tensor.is_meta for tensor in moved)


def test_encode_sets_the_weight_and_remembers():
    layer = nn.Linear(4, 3)
    code = Affine.nearest(layer.weight, 0.1, bits=4)
    encode(layer, code)
    assert torch.equal(layer.weight, code.decode())
    assert encodings(nn.Sequential(layer)) == {"0.weight": code}
    clear_encodings(layer)
    assert not encodings(layer)
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(3, 4\)"):
        encode(layer, Affine.nearest(torch.zeros(3, 5), 0.1, bits=4))


def test_layer_policy():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert [(n, b) for n, _, b in select_layers(model, 4)] == [("0", 4), ("1.0", 4), ("1.1", 4), ("2", 4)]
    assert [b for *_, b in select_layers(model, 4, edge_bits=8)] == [8, 4, 4, 8]
    assert [n for n, *_ in select_layers(model, 4, edge_bits=32)] == ["1.0", "1.1"]
    assert [n for n, *_ in select_layers(model, 4, skip=("1",))] == ["0", "2"]
    model[2].weight = model[1][0].weight
    assert [n for n, *_ in select_layers(model, 4)] == ["0", "1.0", "1.1"]
