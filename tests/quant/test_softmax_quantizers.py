"""Quantizers for softmax and GELU: the authors' known answers, and what they promise."""

import math

import numpy as np
import pytest
import torch

from qbench.quant.activations import build, describe
from qbench.quant.log_quantizer import LogQuantizer
from qbench.quant.twin_quantizers import GELU_LEAST, TwinGelu, TwinSoftmax

probabilities = torch.cat([torch.linspace(0, 1, 4001), torch.logspace(-9, 0, 4001)])
after_gelu = torch.nn.functional.gelu(torch.linspace(-6, 4, 8001))


def test_log_sqrt2_is_that_of_the_authors(shared):
    golden = np.load(shared / "golden" / "baselines.npz")
    quantizer = LogQuantizer(4, 2, float(golden["logsqrt2_delta_b4"]))
    answers = quantizer(torch.from_numpy(golden["logsqrt2_x"]))
    assert np.array_equal(answers.numpy(), golden["logsqrt2_q_b4"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_octave", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_log_rounds_the_exponent(bits, per_octave, scale):
    quantizer = LogQuantizer(bits, per_octave, scale)
    answers = quantizer(probabilities)
    values = scale * 2.0 ** -(torch.arange(2**bits) / per_octave)
    positive = probabilities > values[-1] * 2 ** (-0.49 / per_octave)
    nearest = (probabilities[positive, None].log2() - values.log2()).abs().argmin(1)
    assert torch.allclose(answers[positive], values[nearest], rtol=1e-5)
    assert not answers[probabilities < values[-1] * 2 ** (-0.51 / per_octave)].any()
    assert torch.equal(quantizer(answers), answers)
    assert (answers.sort().values == answers[probabilities.argsort()]).all()
    if quantizer(values[-1]) > 0 and math.log2(1e9) > 2**bits:
        assert answers.unique().numel() == quantizer.levels


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("exponent", [0, 1, 3, 6, 12])
def test_twin_softmax_as_the_authors_code_has_it(bits, exponent):
    split, top = 2.0**-exponent, 2 ** (bits - 1) - 1
    quantizer = TwinSoftmax(bits, split)
    answers = quantizer(probabilities)
    x = probabilities.double()
    coarse = (x.clamp(split, 1) * top).round().clamp(0, top) / top
    fine = (x.clamp(0, split) / (split / top)).round().clamp(0, top) * (split / top)
    assert ((answers - (coarse + fine)).abs() > 1e-6).double().mean() < 1e-3  # those that are half-way between two
    assert answers.unique().numel() <= quantizer.levels
    below = probabilities <= split
    if split * top < 0.5:
        assert ((answers - probabilities)[below].abs() <= 0.5001 * split / top).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_twin_gelu_has_a_step_for_either_sign(bits):
    half = 2 ** (bits - 1)
    quantizer = TwinGelu(bits, 3.5 / half)
    answers = quantizer(after_gelu)
    negative = after_gelu < 0
    assert ((answers - after_gelu)[negative].abs() <= 0.5001 * GELU_LEAST / half).all()
    inside = ~negative & (after_gelu <= (half - 1) * 3.5 / half)
    assert ((answers - after_gelu)[inside].abs() <= 0.5001 * 3.5 / half).all()
    assert answers.unique().numel() == quantizer.levels
    assert torch.allclose(quantizer(answers), answers)


def test_gelu_goes_no_lower():
    x = torch.linspace(-2, 0, 100_001, dtype=torch.float64)
    assert -torch.nn.functional.gelu(x).min() == pytest.approx(GELU_LEAST, abs=1e-7)


@pytest.mark.parametrize("quantizer", [LogQuantizer(4, 2, 0.9), TwinSoftmax(4, 0.125), TwinGelu(6, 0.2)])
def test_rebuilt_from_the_description(quantizer):
    again = build(describe(quantizer))
    assert not torch.equal(again(after_gelu.abs()), quantizer(after_gelu.abs()))
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(after_gelu.abs()), quantizer(after_gelu.abs()))
