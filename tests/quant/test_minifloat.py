"""Small floats and blocks of them, against brute force over all code points."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qbench.quant.audit import audit
from qbench.quant.encodings import Cast, Codebook, Scaled, restore
from qbench.quant.layers import encode
from qbench.quant.minifloat import FORMATS, microscaled, nvfp4

NAMES = sorted(FORMATS)
SPECIAL = {"fp8_e4m3": lambda e, m: e == 15 and m == 7, "fp8_e5m2": lambda e, m: e == 31}
BIAS = {"fp8_e4m3": 7, "fp8_e5m2": 15, "fp6_e3m2": 3, "fp6_e2m3": 1, "fp4_e2m1": 1}
EXPONENT_OF_LARGEST = {"fp8_e4m3": 8, "fp8_e5m2": 15, "fp6_e3m2": 4, "fp6_e2m3": 2, "fp4_e2m1": 2}


def code_points(name):
    """Every finite non-negative number of a format and its mantissa, read from its bits."""
    ebits, mbits = int(name[-3]), int(name[-1])
    points = []
    for code in range(2 ** (ebits + mbits)):
        e, m = code >> mbits, code & (2**mbits - 1)
        if SPECIAL.get(name, lambda e, m: False)(e, m):
            continue
        fraction = Fraction(m, 2**mbits)
        size = (1 + fraction) * Fraction(2) ** (e - BIAS[name]) if e else fraction * Fraction(2) ** (1 - BIAS[name])
        points.append((size, m))
    return points


def brute(x, name):
    """The nearest of all code points; of two as near, the one with an even mantissa."""
    size = abs(Fraction(x))
    nearest = min(code_points(name), key=lambda point: (abs(point[0] - size), point[1] % 2))
    return math.copysign(float(nearest[0]), x)


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_all_code_points(name):
    sizes = [float(size) for size, _ in code_points(name)]
    assert FORMATS[name].levels().tolist() == [-s for s in sizes[:0:-1]] + sizes
    assert FORMATS[name].largest == sizes[-1]
    assert FORMATS[name].greatest_exponent == EXPONENT_OF_LARGEST[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_number_and_every_tie(name):
    sizes = torch.tensor([float(size) for size, _ in code_points(name)])
    middles = (sizes[1:] + sizes[:-1]) / 2
    beyond = torch.tensor([sizes[-1] * 1.0001, sizes[-1] * 1.5, 1e30, 3.4e38])
    around = [middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(1e38))]
    x = torch.cat([sizes, *around, beyond, torch.tensor([1e-45, 1e-20])])
    expected = torch.tensor([brute(v, name) for v in x.tolist()])
    assert torch.equal(FORMATS[name].round(x), expected)
    assert torch.equal(FORMATS[name].round(-x), -expected)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(NAMES), st.floats(-1e5, 1e5, width=32))
@example("fp4_e2m1", 5.0)
def test_numbers_at_random(name, x):
    assert float(FORMATS[name].round(torch.tensor([x]))) == brute(x, name)


def test_ties_and_saturation_of_fp4():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -5.0, -100.0])
    assert FORMATS["fp4_e2m1"].round(x).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -4, -6]


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_eight_bits_round_as_torch_does(name):
    form = FORMATS[name]
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 1, 20_000)
    assert torch.equal(form.round(x), x.to(form.dtype).float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [0, 1])
def test_stored_numbers_are_what_they_were(name, axis):
    form = FORMATS[name]
    values = form.levels()[torch.randint(0, len(form.levels()), (3, 4, 5), generator=torch.Generator().manual_seed(0))]
    code = form.store(values, axis)
    assert torch.equal(code.decode(), values)
    octets = sum(t.numel() * t.element_size() for key, t in code.tensors().items() if key in ("codes", "values"))
    assert octets == math.ceil(60 * form.bits / 8)


# ------------------------------------------------------------------------------------------------------------- blocks


def roundtrip(encoding):
    return restore(encoding.meta(), {k: v.clone() for k, v in encoding.tensors().items()}).decode()


def brute_block(block, name):
    largest = max(abs(v) for v in block)
    shared = 1.0
    if largest:
        exponent = math.frexp(largest)[1] - 1 - EXPONENT_OF_LARGEST[name]
        shared = 2.0 ** min(max(exponent, -127), 127)
    return [brute(v / shared, name) * shared for v in block]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_against_brute_force(name):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 70, generator=generator) * torch.tensor([[1.0], [1e-30], [1e20]])
    weight[0, 32:64] = 0
    weight[1, 0] = 1.999  # an outlier
    code = microscaled(weight, FORMATS[name])
    assert code.grid == (3, 3)
    rows = [[v for i in range(0, 70, 32) for v in brute_block(row[i : i + 32], name)] for row in weight.tolist()]
    assert torch.equal(code.decode(), torch.tensor(rows))
    assert torch.equal(roundtrip(code), code.decode())
    assert isinstance(code.scale, Cast)
    assert code.tensors()["scale.values"].element_size() == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_of_a_block_may_saturate(name):
    form = FORMATS[name]
    just_below = torch.full((1, 32), 1.0)
    just_below[0, 3] = 1.9999
    code = microscaled(just_below, form)
    top = form.largest / 2**form.greatest_exponent
    assert float(code.decode().max()) == top
    assert float(code.scale.decode()) == 2.0**-form.greatest_exponent


def test_the_extremes_of_shared_scales():
    form = FORMATS["fp4_e2m1"]
    tiny = microscaled(torch.full((1, 4), 2.0**-140), form)
    assert float(tiny.scale.decode()) == 2.0**-127
    assert float(tiny.decode().abs().max()) == 0  # below half of the least element, 2**-128
    huge = microscaled(torch.full((1, 4), 2.0**127), form)
    assert (huge.decode() == 2.0**127).all()
    powers = torch.exp2(torch.arange(-127, 128).double()).float()
    stored = Cast(powers.to(torch.float8_e8m0fnu))
    assert torch.equal(roundtrip(stored), powers)


def test_nvfp4_against_brute_force():
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[1.0], [0.0], [1e-4], [9.0]]
    )
    code = nvfp4(weight)
    whole = float(weight.abs().max() / (6 * 448))
    for row, decoded in zip(weight.tolist(), code.decode().tolist(), strict=True):
        for i in range(0, 40, 16):
            block = row[i : i + 16]
            scale = brute(max(abs(v) for v in block) / 6 / whole, "fp8_e4m3") * whole
            expected = [brute(v / scale, "fp4_e2m1") * scale if scale else 0.0 for v in block]
            assert decoded[i : i + 16] == pytest.approx(expected, rel=1e-6)
    assert float(code.scale.decode().max()) == 448
    assert torch.equal(roundtrip(code), code.decode())
    sizes = {key: t.numel() * t.element_size() for key, t in code.tensors().items()}
    assert sizes == {"inner.codes": 80, "inner.levels": 60, "inner.scale": 4, "scale.values": 12}


def test_blocks_of_channels_on_another_axis():
    weight = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(0))
    turned = microscaled(weight.transpose(0, 1).contiguous(), FORMATS["fp6_e3m2"])
    code = microscaled(weight, FORMATS["fp6_e3m2"], axis=1)
    assert torch.equal(code.decode(), turned.decode().transpose(0, 1))


def test_a_scale_hides_no_levels():
    layer = torch.nn.Linear(64, 2)
    narrow = Codebook(torch.arange(128).reshape(2, 64).int() % 16, torch.arange(4.0)[torch.arange(16) % 4][None, None])
    encode(layer, Scaled(narrow, Cast(torch.ones(2, 4)), (2, 4), 0, 16))
    claim = audit(torch.nn.Sequential(layer))["0.weight"]
    assert claim == {"levels": 16, "used": 4}
