"""Integer kernels really run where ONNX Runtime has them, and what does not is said."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from qbench import registry
from qbench.errors import Unsupported
from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, named_weight_layers, output_axis, weight_of
from qbench.runtimes.base import Compiled
from qbench.runtimes.onnxruntime import layer_of

pytest.importorskip("onnxruntime", reason="an optional extra: pip install 'qbench[onnx]'")


def _compile(model: nn.Module, x: torch.Tensor) -> Compiled:
    compiled: Compiled = registry.get("runtime", "onnxruntime")().compile(model, x, threads=1)
    return compiled


def _quantize(model: nn.Module) -> nn.Module:
    for layer in named_weight_layers(model).values():
        weight, axis = weight_of(layer), output_axis(layer)
        top = weight.movedim(axis, 0).flatten(1).abs().amax(1)
        # With 7 bits no sum of two products overflows 16 bits, which is where kernels without VNNI saturate.
        encode(layer, Affine.nearest(weight, top / 63, bits=7, axis=axis))
        quantize_input(layer, StaticQuantizer(8, False, 2.0**-5, 128))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16)])
def test_linear_layers_run_on_integers(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = _quantize(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)))
    x = torch.randn(*shape)
    compiled = _compile(model, x)
    assert compiled.claimed_layers == ("0", "2")
    assert (compiled.integer_layers, compiled.compute_layers, compiled.float_layers) == (2, 2, {})
    (found,), wanted = compiled.run(x.numpy()), model(x).numpy()
    assert np.mean(np.abs(found - wanted) > 1e-3) < 0.02


def test_convolutions_run_on_integers_where_a_quantizer_follows() -> None:
    torch.manual_seed(0)
    model = _quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    quantize_input(model[2], StaticQuantizer(8, False, 2.0**-5))
    x = torch.randn(1, 3, 9, 9)
    compiled = _compile(model, x)
    assert len(compiled.claimed_layers) == 2
    assert (compiled.integer_layers, compiled.compute_layers) == (1, 2)
    assert compiled.float_layers.keys() == {"2"}
    assert "as Conv: no quantizer follows it" in compiled.float_layers["2"]
    (found,), wanted = compiled.run(x.numpy()), model(x).numpy()
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("node", "layer"),
    [
        ("/network/layer2/layer2.0/downsample/downsample.0/Conv_token_3", "layer2.0.downsample.0"),
        ("/network/blocks/blocks.0/attn/matmul0/MatMul/MatMulScaleFusion/", "blocks.0.attn.matmul0"),
        ("/network/fc/MatMul", "fc"),
        ("/network/fc_1/MatMul", None),
        ("/network/layer2/layer2.0/Add", None),
    ],
)
def test_nodes_tell_their_layers(node: str, layer: str | None) -> None:
    assert layer_of(node, ("layer2.0.downsample.0", "blocks.0.attn.matmul0", "fc")) == layer
    assert layer_of("/network/Conv", ("",)) == ""


def test_simulations_are_refused() -> None:
    model = _quantize(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(Unsupported, match="none of the 1 integer layers"):
        _compile(model, torch.randn(1, 3, 9, 9))
    model = nn.Sequential(nn.Linear(4, 4))
    encode(model[0], Affine.nearest(weight_of(model[0]), 0.01, bits=8))
    with pytest.raises(Unsupported, match="no input quantizers: weights only"):
        _compile(model, torch.randn(1, 4))


def test_the_float_network_runs_in_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(392, 4)).eval()
    x = torch.randn(2, 3, 9, 9)
    compiled = _compile(model, x)
    assert (compiled.integer_layers, compiled.compute_layers, compiled.claimed_layers) == (0, 2, ())
    np.testing.assert_allclose(compiled.run(x.numpy())[0], model(x).detach().numpy(), atol=1e-5)


def test_without_the_extra_the_reason_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unsupported, match=r"onnxruntime is not installed \(pip install 'qbench\[onnx\]'\)"):
        _compile(nn.Linear(2, 2), torch.zeros(1, 2))


def test_nodes_of_the_runtime_itself_are_no_layers() -> None:
    assert layer_of("fused 0", ("features.0",)) is None
    assert layer_of("/network/features/features.0/Conv", ("features.0",)) == "features.0"
