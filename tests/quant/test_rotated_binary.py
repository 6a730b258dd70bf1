"""Binarization in the basis of the inputs: what BiTAT promises."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from qbench.quant.binary import BinaryWeight
from qbench.quant.encodings import Sum, restore
from qbench.quant.fakequant import deploy, quantize_weight
from qbench.quant.layers import encodings
from qbench.quant.rotated_binary import RotatedBinaryWeight


def problem(outputs: int = 12, channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, correlated inputs, and their mean outer product."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, channels, 3, 3)
    d = channels * 9
    inputs = torch.randn(500, d) @ torch.randn(d, d) * torch.logspace(-1, 1, d)
    return weight, inputs, inputs.T @ inputs / len(inputs)


def rotated(
    weight: Tensor, gram: Tensor, *, share: float, kept: int = 8, groups: int = 8, block: int = 99
) -> nn.Module:
    quantizer = RotatedBinaryWeight(weight, block_size=block, share=share, kept_bits=kept, groups=groups)
    assert torch.equal(quantizer(weight), weight), "it waits"
    quantizer.rotate(weight, gram)
    return quantizer


@pytest.mark.parametrize(("block", "size"), [(99, 36), (18, 18), (20, 18), (5, 9)])
def test_the_basis_is_orthonormal_and_diagonalizes_the_inputs(block: int, size: int) -> None:
    weight, _, gram = problem()
    basis = rotated(weight, gram, share=0.1, block=block).basis
    assert basis.shape == (36 // size, size, size)
    eye = torch.eye(size).expand_as(basis)
    torch.testing.assert_close(basis.mT @ basis, eye, atol=1e-6, rtol=0)
    for i, axes in enumerate(basis):
        own = axes.T @ gram[i * size : (i + 1) * size, i * size : (i + 1) * size] @ axes
        assert (own - own.diag().diag()).norm() < 1e-4 * own.norm()


def test_all_axes_kept_in_float_give_the_weight() -> None:
    weight, _, gram = problem()
    torch.testing.assert_close(rotated(weight, gram, share=1.0, kept=32)(weight), weight, atol=1e-5, rtol=1e-5)


def test_without_rotation_and_kept_axes_it_is_bwn() -> None:
    weight, _, _ = problem()
    quantizer = RotatedBinaryWeight(weight, block_size=99, share=0.0, kept_bits=8, groups=1)
    quantizer.waiting = False
    quantized, expected = (q(weight) for q in (quantizer, BinaryWeight()))
    assert torch.equal(quantized, expected)
    grads = []
    for q in (quantizer, BinaryWeight()):
        own = weight.clone().requires_grad_()
        q(own).square().sum().backward()
        grads.append(own.grad)
    torch.testing.assert_close(*grads)


def test_keeping_axes_by_importance_beats_keeping_any() -> None:
    weight, inputs, gram = problem()

    def error(quantizer: nn.Module) -> float:
        return ((quantizer(weight) - weight).flatten(1) @ inputs.T).square().mean().item()

    quantizer = rotated(weight, gram, share=0.1, groups=1)
    best = error(quantizer)
    basis = quantizer.basis.clone()
    for _ in range(10):
        quantizer.basis.copy_(basis[:, :, torch.randperm(36)])
        assert error(quantizer) > 2 * best


def test_more_groups_of_axes_err_less() -> None:
    weight, inputs, gram = problem()
    errors = []
    for groups in (1, 2, 8):
        difference = (rotated(weight, gram, share=0.0, groups=groups)(weight) - weight).flatten(1)
        errors.append((difference @ inputs.T).square().mean().item())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("share", "kept", "block"), [(0.05, 8, 18), (0.0, 8, 99), (1.0, 32, 9), (0.3, 4, 9)])
def test_the_artifact_holds_what_was_trained(share: float, kept: int, block: int) -> None:
    weight, _, gram = problem()
    layer = nn.Conv2d(4, 12, 3)
    layer.weight.data.copy_(weight)
    quantizer = rotated(weight, gram, share=share, kept=kept, block=block)
    quantize_weight(layer, quantizer)
    seen = layer.weight.detach().clone()
    copy.deepcopy(layer)
    deploy(layer)
    torch.testing.assert_close(layer.weight.detach(), seen, atol=1e-5, rtol=1e-5)
    (encoding,) = encodings(layer).values()
    assert isinstance(encoding, Sum)
    again = restore(encoding.meta(), encoding.tensors())
    assert torch.equal(again.decode(), layer.weight)
    kept_axes = quantizer.kept * len(quantizer.basis)
    width = 32 if kept == 32 else math.log2(2**kept - 1)
    assert encoding.nominal_bits == pytest.approx(12 * (kept_axes * width + 36 - kept_axes))


def test_gradients_pass_through_the_rotation() -> None:
    weight, _, gram = problem()
    weight = (weight / 10).requires_grad_()
    g = torch.randn_like(weight)
    rotated(weight, gram, share=1.0, kept=8)(weight).backward(g)
    torch.testing.assert_close(weight.grad, g, atol=1e-5, rtol=1e-5)
