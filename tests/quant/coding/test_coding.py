"""Coders: every stream decodes to what was coded, and one that was changed is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.quant import coding
from qbench.quant.coding import DamagedError, entropy, hac, huffman, runs
from qbench.quant.coding.rans import encode as rans_encode

CODERS = ["huffman", "rans", "hac", "shac", "csr"]


def peaked(shape, levels=16, seed=0, spread=1.5):
    draw = np.random.default_rng(seed).normal(levels / 2, spread, shape).round()
    return torch.from_numpy(draw.clip(0, levels - 1).astype(np.int32))


def round_trip(codes, levels, coder):
    stored = coding.encode(codes, levels, coder)
    assert stored.dtype == torch.uint8
    assert torch.equal(coding.decode(stored, levels, codes.shape, coder), codes)
    return stored


@pytest.mark.parametrize("coder", [None, *CODERS])
@pytest.mark.parametrize(
    ("shape", "levels"), [((40, 25), 16), ((8, 3, 3, 3), 255), ((300, 700), 5), ((2000, 3), 65536), ((7,), 2)]
)
def test_round_trip(coder, shape, levels):
    round_trip(peaked(shape, levels, spread=min(levels / 8, 300)), levels, coder)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CODERS),
    st.integers(1, 70),
    st.lists(st.integers(0, 10**6), min_size=0, max_size=300),
    st.booleans(),
)
def test_round_trip_of_anything(coder, levels, numbers, skewed):
    codes = torch.tensor([n % levels if not skewed or n % 7 == 0 else 0 for n in numbers], dtype=torch.int32)
    round_trip(codes[None], levels, coder)


@pytest.mark.parametrize("coder", CODERS)
def test_empty_and_single_symbol(coder):
    round_trip(torch.zeros(0, 4, dtype=torch.int32), 16, coder)
    stored = round_trip(torch.full((400, 40), 3, dtype=torch.int32), 16, coder)
    assert len(stored) < 400


@pytest.mark.parametrize("coder", CODERS)
def test_sparse_codes_get_smaller(coder):
    codes = torch.zeros(200, 100, dtype=torch.int32)
    codes[torch.randperm(200, generator=torch.Generator().manual_seed(0))[:20], :30] = 7
    assert len(round_trip(codes, 16, coder)) < 0.35 * 200 * 100 / 2


@pytest.mark.parametrize("coder", CODERS)
def test_what_coding_would_enlarge_is_stored_as_it_is(coder):
    codes = torch.arange(16, dtype=torch.int32).repeat(4, 1)
    assert len(round_trip(codes, 16, coder)) == 5 + 4 * 16 // 2


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("shape", [(60, 50), (4, 4)])
def test_damage_is_found(coder, shape):
    codes = peaked(shape)
    stored = coding.encode(codes, 16, coder)
    for cut in (0, 4, 7, len(stored) // 2, len(stored) - 1):
        with pytest.raises(DamagedError, match=coder):
            coding.decode(stored[:cut], 16, codes.shape, coder)
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(stored), 40):
        changed = stored.clone()
        changed[place] ^= 1 << int(generator.integers(8))
        try:
            same = torch.equal(coding.decode(changed, 16, codes.shape, coder), codes)
        except DamagedError:
            continue
        # Only bits that carry nothing, such as padding, may change unseen.
        assert same


@pytest.mark.parametrize("coder", CODERS)
def test_another_shape_is_damage(coder):
    codes = peaked((60, 50))
    with pytest.raises(DamagedError):
        coding.decode(coding.encode(codes, 16, coder), 16, (60, 51), coder)


def test_plain_codes_of_another_size_are_damage():
    with pytest.raises(DamagedError, match="7 bytes cannot be 16 codes of 4 bits"):
        coding.decode(torch.zeros(7, dtype=torch.uint8), 16, (4, 4))


def test_huffman_of_known_sources():
    assert huffman.code_lengths(np.array([5, 5, 5, 5])).tolist() == [2, 2, 2, 2]
    dyadic = np.array([8, 4, 2, 2])
    assert huffman.code_lengths(dyadic).tolist() == [1, 2, 3, 3]
    assert entropy.huffman_bits(dyadic) == entropy.entropy_bits(dyadic) == 16 * 1.75
    assert huffman.code_words(huffman.code_lengths(dyadic)).tolist() == [0b0, 0b10, 0b110, 0b111]
    assert huffman.write(np.array([1, 0, 3]), huffman.code_lengths(dyadic)).tolist() == [0b10011100]


def test_code_words_are_limited():
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman.code_lengths(np.array(fibonacci))
    assert lengths.max() == 16
    assert (0.5 ** lengths.astype(float)).sum() == 1
    # Unlimited, the least frequent of 30 has 29 bits.
    assert huffman.code_lengths(np.array(fibonacci), limit=29).max() == 29


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40))
def test_huffman_is_within_its_bounds(counts):
    counts = np.array(counts)
    total, bound = counts.sum(), entropy.entropy_bits(counts)
    used = entropy.huffman_bits(counts)
    assert bound <= used + 1e-6
    assert used / total <= bound / total + min(1, counts.max() / total + 0.0861)


def test_sparsity_aware_bound_is_the_entropy():
    counts = np.array([600, 50, 100, 3, 0, 47])
    split = entropy.mask_bits(800, 600) + entropy.entropy_bits(counts[1:])
    assert split == pytest.approx(entropy.entropy_bits(counts))


def test_rans_nearly_reaches_the_entropy():
    codes = peaked((400, 300))
    counts = np.bincount(codes.flatten(), minlength=16)
    bits = 8 * rans_encode(codes.numpy().astype(np.uint16), 16)[2].nbytes
    assert entropy.entropy_bits(counts) <= bits + 1
    assert bits < entropy.entropy_bits(counts) * 1.0001 + 64


def test_long_streams():
    codes = peaked((1500, 1500), levels=64, spread=9)  # more than one segment
    for coder in ("huffman", "rans"):
        round_trip(codes, 64, coder)


def test_relative_index_fills_gaps():
    codes = np.zeros((1, 100), np.uint16)
    codes[0, [0, 1, 33, 34, 99]] = 1  # distances 1, 1, 32, 1, 65
    head, distances, values = runs.encode(codes, 2)
    assert np.frombuffer(head, "<u4").tolist() == [0, 7]  # 65 needs two fillers
    assert (len(distances), len(values)) == (-(-7 * 5 // 8), 1)
    assert np.array_equal(runs.decode([head.view(np.uint8), distances, values], (1, 100), 2), codes)


def test_paper_accounting(shared):
    golden = np.load(shared / "golden" / "baselines.npz")
    matrix = golden["ham_matrix"]
    values, inverse = np.unique(matrix, return_inverse=True)
    counts, zero = np.bincount(inverse.ravel()), int(np.flatnonzero(values == 0)[0])
    lengths = dict(zip(values.round(1).tolist(), huffman.code_lengths(counts).tolist(), strict=True))
    assert lengths[0.0] == 1
    assert sorted(lengths.values()) == [1, 3, 3, 3, 4, 4]
    assert hac.payload_bits(counts) == golden["ham_bits"][0]
    assert hac.dense_bits(counts) / matrix.size == golden["ham_bits"][1]
    assert hac.sparse_bits(counts, zero, matrix.shape) / matrix.size == golden["sham_bits"][1]
    assert entropy.entropy_bits(counts) / matrix.size == pytest.approx(golden["ham_entropy"])
    codes = torch.from_numpy(inverse.reshape(matrix.shape).astype(np.int32))
    words = 4 * -(-int((counts * huffman.code_lengths(counts)).sum()) // 32)
    assert hac.Dense.encode(codes.numpy().astype(np.uint16), 6)[2].nbytes == words == golden["ham_bits"][0] / 8
    # The words, row indices and counts per column.
    _, _, stream, _, *indices = hac.Sparse.encode(codes.numpy().astype(np.uint16), 6)
    assert 8 * sum(part.nbytes for part in (stream, *indices)) == golden["sham_bits"][0]
    for coder in ("hac", "shac"):
        round_trip(codes, 6, coder)
