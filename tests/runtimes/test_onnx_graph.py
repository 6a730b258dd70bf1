"""The written graph stores what was quantized, and answers like the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qbench import registry
from qbench.errors import Unsupported
from qbench.quant.activations import DynamicQuantizer, StaticQuantizer, quantize_input
from qbench.quant.binary import BinaryWeight, binary_codes
from qbench.quant.encodings import Affine, Cast, Codebook, Encoding, Rotated, Scaled, Sum, VectorCodebook, to_rows
from qbench.quant.layers import encode, named_weight_layers, output_axis, weight_of
from qbench.quant.log_quantizer import LogQuantizer
from qbench.quant.matmuls import MatMul, operands, products
from qbench.quant.twin_quantizers import TwinGelu, TwinSoftmax

onnx = pytest.importorskip("onnx", reason="an optional extra: pip install 'qbench[onnx]'")

from qbench.runtimes.onnx_graph import to_onnx  # noqa: E402
from qbench.runtimes.onnxruntime import open_session  # noqa: E402

INT4, INT8, INT16 = onnx.TensorProto.INT4, onnx.TensorProto.INT8, onnx.TensorProto.INT16
UINT4, UINT8 = onnx.TensorProto.UINT4, onnx.TensorProto.UINT8
FLOATS = (onnx.TensorProto.FLOAT,)


class _Three(nn.Module):
    """A convolution, a transposed one, whose output channels are its weight's second axis, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.up = nn.ConvTranspose2d(6, 5, 2)
        self.linear = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.up(self.conv(x)).mean((2, 3)))


def _grid(weight: Tensor, axis: int, bits: int, *, whole: bool = True, group_size: int | None = None) -> Affine:
    rows = to_rows(weight, axis)
    groups = -(-rows.shape[1] // group_size) if group_size else 1
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).repeat(1, groups) * torch.linspace(1, 0.5, groups)
    zero = -low / scale
    zero = zero.round() if whole else zero + 0.25
    return Affine.nearest(weight, scale, bits=bits, zero_point=zero, axis=axis, group_size=group_size)


def _symmetric(weight: Tensor, axis: int, bits: int, group_size: int | None = None) -> Affine:
    rows = to_rows(weight, axis)
    groups = -(-rows.shape[1] // group_size) if group_size else 1
    top = rows.abs().amax(1, keepdim=True).repeat(1, groups) * torch.linspace(1, 0.5, groups)
    return Affine.nearest(weight, top / (2 ** (bits - 1) - 1), bits=bits, axis=axis, group_size=group_size)


def _levels(weight: Tensor, axis: int, *shape: int, scaled: bool = False) -> Codebook:
    generator = torch.Generator().manual_seed(3)
    rows = to_rows(weight, axis)
    count = {1: (), 2: (len(rows),), 3: (len(rows), -(-rows.shape[1] // 4))}[shape[0]]
    scale = torch.rand(len(rows), -(-rows.shape[1] // 4), generator=generator) + 0.5 if scaled else None
    levels = torch.randn(*count, shape[1], generator=generator)
    return Codebook.nearest(weight, levels, scale=scale, axis=axis, group_size=4 if scaled or shape[0] == 3 else None)


def _vectors(weight: Tensor, axis: int) -> VectorCodebook:
    rows = to_rows(weight, axis)
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 300, (len(rows), -(-rows.shape[1] // 2)), generator=generator)
    return VectorCodebook(codes, torch.randn(300, 2, generator=generator), tuple(weight.shape), axis)


def _rotated(weight: Tensor, axis: int) -> Rotated:
    d = to_rows(weight, axis).shape[1]
    matrix = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(5)))[0]
    return Rotated(_symmetric(weight, axis, 8), matrix, axis)


def _rotated_in_blocks(weight: Tensor, axis: int) -> Rotated:
    rows = to_rows(weight, axis)
    size = 5 if rows.shape[1] == 5 else 3
    blocks = rows.shape[1] // size
    matrices = torch.randn(blocks, size, 2, generator=torch.Generator().manual_seed(5))
    inner = torch.randn(len(rows), 2 * blocks, generator=torch.Generator().manual_seed(6))
    return Rotated(_symmetric(inner, 0, 8), matrices, axis, tuple(weight.shape))


def _sum(weight: Tensor, axis: int) -> Sum:
    coarse = _symmetric(weight, axis, 4)
    return Sum((coarse, _symmetric(weight - coarse.decode(), axis, 4)))


def _microscaled(weight: Tensor, axis: int) -> Scaled:
    rows = to_rows(weight, axis)
    grid = (len(rows), -(-rows.shape[1] // 4))
    powers = 2.0 ** torch.randint(-9, 9, grid, generator=torch.Generator().manual_seed(6))
    return Scaled(Cast(weight.to(torch.float8_e4m3fn)), Cast(powers.to(torch.float8_e8m0fnu)), grid, axis, 4)


KINDS = {
    "a scale per channel": (lambda w, a: _symmetric(w, a, 8), {INT8}),
    "a scale": (lambda w, a: Affine.nearest(w, float(w.abs().max()) / 127, bits=8, axis=a), {INT8}),
    "four bits": (lambda w, a: _symmetric(w, a, 4), {INT4}),
    "groups": (lambda w, a: _symmetric(w, a, 4, 4), {INT4}),
    "zero points": (lambda w, a: _grid(w, a, 8), {INT8, UINT8}),
    "zero points, four bits": (lambda w, a: _grid(w, a, 4), {INT4, UINT4}),
    "zero points of groups": (lambda w, a: _grid(w, a, 4, group_size=4), {INT4, UINT4, INT8, UINT8}),
    "fractional zero points": (lambda w, a: _grid(w, a, 4, whole=False), {UINT4}),
    "fractional zero points of groups": (lambda w, a: _grid(w, a, 4, whole=False, group_size=4), {UINT4}),
    "twelve bits": (lambda w, a: _symmetric(w, a, 12), {INT16}),
    "a codebook": (lambda w, a: _levels(w, a, 1, 7), {INT4}),
    "a codebook per channel": (lambda w, a: _levels(w, a, 2, 40), {INT8}),
    "a codebook per group": (lambda w, a: _levels(w, a, 3, 16), {UINT4, INT4}),
    "a scaled codebook": (lambda w, a: _levels(w, a, 1, 16, scaled=True), {UINT4, INT4}),
    "vectors": (_vectors, {INT16}),
    "float16": (lambda w, a: Cast(w.half()), {onnx.TensorProto.FLOAT16}),
    "bfloat16": (lambda w, a: Cast(w.bfloat16()), {onnx.TensorProto.BFLOAT16}),
    "float8": (lambda w, a: Cast(w.to(torch.float8_e4m3fn)), {onnx.TensorProto.FLOAT8E4M3FN}),
    "float8 of wide range": (lambda w, a: Cast(w.to(torch.float8_e5m2)), {onnx.TensorProto.FLOAT8E5M2}),
    "a sum": (_sum, {INT4}),
    "rotated": (_rotated, {INT8}),
    "rotated in blocks": (_rotated_in_blocks, {INT8}),
    "signs": (lambda w, a: binary_codes(BinaryWeight(a)(w), a), {INT4, UINT4}),
    "scaled by powers of two": (_microscaled, {onnx.TensorProto.FLOAT8E4M3FN, UINT8}),
}


def _three() -> _Three:
    torch.manual_seed(0)
    return _Three().eval().requires_grad_(False)


def _answers(graph: object, x: Tensor, *, optimize: bool = False) -> np.ndarray:
    session = open_session(graph.SerializeToString(), optimize=optimize)  # type: ignore[attr-defined]
    answers: np.ndarray = session.run(None, {"images": x.numpy()})[0]
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoding_is_stored_as_it_is_and_decodes_alike(kind: str) -> None:
    make, types = KINDS[kind]
    model = _three()
    for layer in named_weight_layers(model).values():
        encoding: Encoding = make(weight_of(layer), output_axis(layer))
        encode(layer, encoding)
    graph = to_onnx(model, torch.zeros(1, 3, 8, 8), dynamic=True)
    found = {tensor.data_type for tensor in graph.graph.initializer if tensor.data_type not in FLOATS}
    found -= {onnx.TensorProto.INT32, onnx.TensorProto.INT64}  # positions and shapes
    assert found
    assert found <= types
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = model(x).numpy()
    for optimize in (False, True):
        np.testing.assert_allclose(_answers(graph, x, optimize=optimize), wanted, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 5, 8, 12])
def test_static_inputs_are_rounded_alike(bits: int, signed: bool) -> None:
    """Steps are powers of two, so that both executions round the very same numbers."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).eval()
    zero = 0 if signed else 2 ** (bits - 1)
    quantize_input(model[0], StaticQuantizer(bits, signed, 2.0 ** (2 - bits), zero))
    encode(model[0], _symmetric(weight_of(model[0]), 0, 8))
    x = torch.linspace(-4, 4, 600).reshape(100, 6)
    graph = to_onnx(model, x[:1], dynamic=True)
    nodes = [node.op_type for node in graph.graph.node]
    assert nodes.count("QuantizeLinear") == (bits <= 8)
    assert bits > 8 or nodes.count("Clip") == (bits < 8)
    np.testing.assert_allclose(_answers(graph, x), model(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "quantizer",
    [
        DynamicQuantizer(),
        DynamicQuantizer(4, True, "token"),
        LogQuantizer(4, 1, 0.9),
        LogQuantizer(4, 2, 0.9),
        TwinSoftmax(4, 0.1),
        TwinGelu(8, 0.01),
    ],
)
def test_other_inputs_are_written_as_arithmetic(quantizer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).eval()
    quantize_input(model[0], quantizer)
    x = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    graph = to_onnx(model, x[:1], dynamic=True)
    found, wanted = _answers(graph, x), model(x).detach().numpy()
    # A logarithm that differs in its last digit may round to the next code.
    assert np.mean(np.abs(found - wanted) > 1e-5) < 0.02


def _quantized(name: str, x: Tensor) -> nn.Module:
    """One of the shipped models with 8-bit weights and inputs, whose ranges are those of the batch `x`."""
    model = registry.resolve("model", name)().load().requires_grad_(False)
    seen: dict[nn.Module, Tensor] = {}
    layers = named_weight_layers(model) | operands(model)
    hooks = [m.register_forward_pre_hook(lambda m, i: seen.__setitem__(m, i[0])) for m in layers.values()]
    model(x)
    for hook in hooks:
        hook.remove()
    for layer in named_weight_layers(model).values():
        encode(layer, _symmetric(weight_of(layer), output_axis(layer), 8))
    for layer, value in seen.items():
        low, high = min(0.0, float(value.min())), max(0.0, float(value.max()))
        scale = (high - low) / 255
        quantize_input(layer, StaticQuantizer(8, False, scale, round(-low / scale)))
    return model


@pytest.mark.parametrize("name", ["digits_resnet", "digits_efficientnet", "digits_vit"])
def test_whole_networks_answer_alike_from_files_of_a_quarter(name: str) -> None:
    x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    model = _quantized(name, x)
    graph = to_onnx(model, x[:1], dynamic=True)
    wanted, found = model(x).numpy(), _answers(graph, x)
    # Roundings flip where float sums differ in their last digit, and the difference grows from layer to layer.
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
    weights = sum(weight_of(layer).numel() for layer in named_weight_layers(model).values())
    stored = [t for t in graph.graph.initializer if t.data_type == INT8]
    assert sum(len(t.raw_data) for t in stored) == pytest.approx(weights, rel=0.02)
    floats = sum(p.numel() for p in model.parameters()) - weights
    assert len(graph.SerializeToString()) < 1.1 * weights + 8 * floats + 100_000


def test_the_model_is_left_as_it_was() -> None:
    model = _three()
    for layer in named_weight_layers(model).values():
        encode(layer, _symmetric(weight_of(layer), output_axis(layer), 4))
    x = torch.randn(1, 3, 8, 8)
    before, state = model(x), list(model.state_dict())
    to_onnx(model, x, dynamic=True)
    assert list(model.state_dict()) == state
    assert torch.equal(model(x), before)


def test_products_of_activations_carry_quantizers() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matmul = MatMul()

        def forward(self, x: Tensor) -> Tensor:
            return self.matmul(x, x.transpose(1, 2))

    model = Product().eval()
    for operand in model.matmul.children():
        quantize_input(operand, StaticQuantizer(8, True, 2.0**-5))
    assert len(products(model)) == 1
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    graph = to_onnx(model, x[:1], dynamic=True)
    assert [n.op_type for n in graph.graph.node].count("QuantizeLinear") == 2
    np.testing.assert_allclose(_answers(graph, x), model(x).numpy(), atol=1e-5)


def test_what_onnx_cannot_say_is_named() -> None:
    @dataclass
    class Strange:
        nominal_bits = 8.0

        def decode(self) -> Tensor:
            return torch.zeros(7, 5)

        tensors = meta = dict

    model = _three()
    encode(model.linear, Strange())
    with pytest.raises(Unsupported, match=r"linear.weight: Strange weights have no ONNX form"):
        to_onnx(model, torch.zeros(1, 3, 8, 8), dynamic=True)


def test_groups_of_four_bits_run_as_one_product(tmp_path: Path) -> None:
    """ONNX Runtime's MatMulNBits, with float sums: what was stored is multiplied as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).eval().requires_grad_(False)
    encode(model[0], _grid(weight_of(model[0]), 0, 4, group_size=32))
    x = torch.randn(3, 64)
    graph = to_onnx(model, x[:1], dynamic=True)
    session = open_session(graph.SerializeToString(), optimized=tmp_path / "optimized.onnx")
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "MatMulNBits" in nodes
    (found,) = session.run(None, {"images": x.numpy()})
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-5)
