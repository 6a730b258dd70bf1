"""Integer kernels really run, and compute what the simulation computes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from qbench import registry
from qbench.errors import Unsupported
from qbench.quant.activations import DynamicQuantizer, StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine, Codebook
from qbench.quant.layers import encode, named_weight_layers, output_axis, weight_of
from qbench.quant.log_quantizer import LogQuantizer
from qbench.quant.matmuls import expose, operands, products
from qbench.registry import parse, resolve
from qbench.runtimes.base import Compiled, flatten
from qbench.runtimes.saturation import saturates
from qbench.workspace import Workspace

pytest.importorskip("openvino", reason="the runtime is an optional extra: pip install 'qbench[openvino]'")


@pytest.fixture(scope="module")
def exact_kernels() -> None:
    """For tests of exact sums of products of 8 bits."""
    if saturates(registry.get("runtime", "openvino")(), 1):
        pytest.skip("the integer kernels of this CPU saturate (it has no VNNI)")


def _weights(model: nn.Module, bits: int = 8) -> nn.Module:
    for layer in named_weight_layers(model).values():
        weight, axis = weight_of(layer), output_axis(layer)
        top = weight.movedim(axis, 0).flatten(1).abs().amax(1)
        encode(layer, Affine.nearest(weight, top / (2 ** (bits - 1) - 1), bits=bits, axis=axis))
    return model


def _inputs(model: nn.Module, x: Tensor, bits: int = 8, symmetric: bool = False) -> nn.Module:
    """Static quantizers that reach to the extremes of one batch."""
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, i: seen.__setitem__(m, i[0].detach()))
        for layer in (named_weight_layers(model) | operands(model)).values()
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    for layer, value in seen.items():
        low, high = min(0.0, float(value.min())), max(0.0, float(value.max()))
        if symmetric:
            quantize_input(layer, StaticQuantizer(bits, True, max(-low, high) / (2 ** (bits - 1) - 1)))
        else:
            scale = (high - low) / (2**bits - 1)
            quantize_input(layer, StaticQuantizer(bits, False, scale, round(-low / scale)))
    return model.eval()


def _compile(model: nn.Module, x: Tensor) -> Compiled:
    compiled: Compiled = registry.get("runtime", "openvino")().compile(model, x, threads=1)
    return compiled


def _pair(model: nn.Module, x: Tensor) -> tuple[Compiled, list[np.ndarray], list[np.ndarray]]:
    with torch.no_grad():
        simulated = [tensor.numpy() for tensor in flatten(model(x))]
    compiled = _compile(model, x)
    return compiled, compiled.run(x.numpy()), simulated


class _Two(nn.Module):
    """Two maps from one trunk, as detectors have; the first layer sees negative inputs, padding and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dSame(3, 16, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.a = nn.Conv2d(16, 8, 1)
        self.b = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y = self.norm(self.stem(x)).relu()
        y = self.deep(y).relu()
        return self.a(y), [self.b(y)]


def _two() -> _Two:
    torch.manual_seed(0)
    model = _Two().eval()
    with torch.no_grad():
        # Scales of either sign, and a dead channel: what folding meets in real networks.
        model.norm.weight.copy_(torch.linspace(-1, 1, 16))
        model.norm.weight[3] = 0
        model.stem.weight[5] = 0
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("weight_bits", "bits", "symmetric"),
    [(8, 8, False), (4, 8, True), (3, 5, False), (2, 2, True)],
)
def test_every_layer_runs_on_integers_and_agrees(
    x: Tensor, weight_bits: int, bits: int, symmetric: bool, request: pytest.FixtureRequest
) -> None:
    if weight_bits == bits == 8:
        request.getfixturevalue("exact_kernels")
    model = _inputs(_weights(_two(), weight_bits), x, bits, symmetric)
    compiled, found, simulated = _pair(model, x)
    assert compiled.claimed_layers == ("stem", "deep", "a", "b")
    assert (compiled.integer_layers, compiled.compute_layers, compiled.float_layers) == (4, 4, {})
    for got, want in zip(found, simulated, strict=True):
        # Of the few values whose rounding flips because float sums differ in their last digit, none may be many.
        assert got.shape == want.shape
        assert np.mean(np.abs(got - want) > 1e-4 * np.abs(want).max()) < 0.01


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize(
    ("layer", "symmetric"), [(nn.Conv2d(3, 8, 3, padding=1), False), (nn.ConvTranspose2d(3, 8, 2, stride=2), True)]
)
def test_one_layer_is_exact(x: Tensor, layer: nn.Module, symmetric: bool) -> None:
    model = _inputs(_weights(nn.Sequential(layer)), x, symmetric=symmetric)
    compiled, (found,), (simulated,) = _pair(model, x)
    assert compiled.integer_layers == 1
    np.testing.assert_allclose(found, simulated, atol=1e-5 * np.abs(simulated).max())


@pytest.mark.usefixtures("exact_kernels")
def test_a_transformer_runs_on_integers() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, img_size=32, patch_size=8, num_classes=10)
    x = torch.randn(1, 3, 32, 32)
    model = _inputs(_weights(model.eval()), x)
    compiled, (found,), (simulated,) = _pair(model, x)
    assert compiled.integer_layers == len(compiled.claimed_layers) == len(named_weight_layers(model))
    assert np.linalg.norm(found - simulated) < 0.05 * np.linalg.norm(simulated)


def _exposed_vit(x: Tensor, symmetric: bool) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, img_size=32, patch_size=8, num_classes=10).eval()
    expose(model, x)
    # With 7 bits no sum of two products overflows 16 bits, which is where kernels without VNNI saturate.
    return _inputs(_weights(model, 7), x, bits=7, symmetric=symmetric)


def test_products_of_activations_run_on_integers() -> None:
    x = torch.randn(1, 3, 32, 32)
    model = _exposed_vit(x, symmetric=True)
    compiled, (found,), (simulated,) = _pair(model, x)
    claimed = named_weight_layers(model).keys() | products(model).keys()
    assert set(compiled.claimed_layers) == claimed
    assert compiled.integer_layers == len(claimed) == len(named_weight_layers(model)) + 12
    assert np.linalg.norm(found - simulated) < 0.05 * np.linalg.norm(simulated)


def test_products_that_are_only_simulated_are_refused() -> None:
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(Unsupported, match=r"operands .* with a zero point .*blocks.0.attn.matmul0"):
        _compile(_exposed_vit(x, symmetric=False), x)
    model = _exposed_vit(x, symmetric=True)
    quantize_input(model.get_submodule("blocks.0.attn.matmul1.left"), LogQuantizer(7, 2))
    with pytest.raises(Unsupported, match=r"operands .* with log input quantizers .*blocks.0.attn.matmul1"):
        _compile(model, x)
    model = _exposed_vit(x, symmetric=True)
    del model.get_submodule("blocks.0.attn.matmul1.left")._modules["input_quantizer"]
    model.get_submodule("blocks.0.attn.matmul1.left")._forward_pre_hooks.clear()
    with pytest.raises(Unsupported, match="of which one operand is float"):
        _compile(model, x)


def test_the_float_network_runs_in_float(x: Tensor) -> None:
    compiled, found, simulated = _pair(_two(), x)
    assert (compiled.integer_layers, compiled.compute_layers, compiled.claimed_layers) == (0, 4, ())
    np.testing.assert_allclose(found[0], simulated[0], atol=1e-5)


def test_edges_may_stay_in_float(x: Tensor) -> None:
    model = _two()
    stem = model.stem.weight.detach().clone()
    _inputs(_weights(model), x)
    model.stem.__dict__.pop("qbench_encodings")
    model.stem._modules.pop("input_quantizer")
    model.stem._forward_pre_hooks.clear()
    model.stem.weight.data.copy_(stem)
    compiled = _compile(model, x)
    assert (compiled.integer_layers, compiled.compute_layers) == (3, 4)
    assert compiled.float_layers == {"stem": "float weights"}


def test_the_model_is_left_as_it_was(x: Tensor) -> None:
    model = _inputs(_weights(_two()), x)
    before, names = model(x)[0].detach(), list(dict(model.named_modules()))
    _compile(model, x)
    assert torch.equal(model(x)[0], before)
    assert list(dict(model.named_modules())) == names


def _levels(model: nn.Module) -> nn.Module:
    for layer in named_weight_layers(model).values():
        encode(layer, Codebook.nearest(weight_of(layer), torch.linspace(-1, 1, 7)))
    return model


def _dynamic(model: nn.Module) -> nn.Module:
    for layer in named_weight_layers(model).values():
        quantize_input(layer, DynamicQuantizer())
    return model


def _asymmetric(model: nn.Module) -> nn.Module:
    for layer in named_weight_layers(model).values():
        weight = weight_of(layer) + 1
        encode(layer, Affine.nearest(weight, 2 / 255, bits=8, zero_point=0.0))
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_weights, "no input quantizers: weights only"),
        (lambda m: _inputs(_levels(m), torch.randn(1, 3, 33, 33)), "codebook weights run as gather + float"),
        (lambda m: _dynamic(_weights(m)), "dynamic input quantizers"),
        (lambda m: _inputs(_weights(m, 12), torch.randn(1, 3, 33, 33)), "do not fit int8"),
        (lambda m: _inputs(_asymmetric(m), torch.randn(1, 3, 33, 33)), "do not fit int8"),
        (lambda m: _inputs(_weights(m), torch.randn(1, 3, 33, 33), 12), "inputs of 12 bits"),
        (lambda m: _inputs(m, torch.randn(1, 3, 33, 33)), "float weights"),
    ],
)
def test_what_cannot_run_on_integers_says_why(x: Tensor, change: object, reason: str) -> None:
    with pytest.raises(Unsupported) as caught:
        _compile(change(_two()), x)  # type: ignore[operator]
    assert str(caught.value).startswith("not deployable as integers: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("second", ["integers", "floats"])
def test_linear_layers_in_one_kernel_are_told_apart(second: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 32)
    model = _inputs(_weights(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), 7), x, 7)
    if second == "floats":
        model[2] = nn.Linear(32, 8)
    compiled, (found,), (simulated,) = _pair(model.eval(), x)
    assert compiled.integer_layers == len(compiled.claimed_layers) == (2 if second == "integers" else 1)
    assert compiled.compute_layers == 2
    assert np.linalg.norm(found - simulated) < 0.02 * np.linalg.norm(simulated)


def test_kernels_that_are_not_integer_are_refused() -> None:
    """OpenVINO has no integer kernel for transposed convolutions of inputs with a zero point."""
    x = torch.randn(1, 3, 9, 9)
    with pytest.raises(Unsupported, match="none of the 1 integer layers"):
        _compile(_inputs(_weights(nn.Sequential(nn.ConvTranspose2d(3, 8, 2, stride=2))), x), x)


def test_a_layer_without_an_integer_kernel_is_named() -> None:
    x = torch.randn(1, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 2, stride=2))
    compiled = _compile(_inputs(_weights(model, 7), x), x)
    assert (compiled.integer_layers, compiled.compute_layers, compiled.claimed_layers) == (1, 2, ("0", "1"))
    assert compiled.float_layers.keys() == {"1"}
    assert "OpenVINO has no integer kernel for it here: it takes" in compiled.float_layers["1"]


def test_one_simulated_layer_is_enough_to_refuse(x: Tensor) -> None:
    model = _inputs(_weights(_two()), x)
    encode(model.a, Codebook.nearest(weight_of(model.a), torch.linspace(-1, 1, 7)))
    with pytest.raises(Unsupported, match=r"codebook weights run as gather \+ float \(a\)"):
        _compile(model, x)


def test_without_the_extra_the_reason_is_that(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(Unsupported, match=r"openvino is not installed \(pip install 'qbench\[openvino\]'\)"):
        _compile(_two(), x)


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("model", ["digits_cnn", "digits_resnet"])
def test_with_steps_that_are_powers_of_two_it_answers_to_the_last_digit_what_the_simulation_does(
    model: str, tmp_path: Path
) -> None:
    space = Workspace(resolve("dataset", "digits"), resolve("model", model), (64, 0), tmp_path, torch.device("cpu"))
    network = space.model.load()
    for step in ("fold_bn", "rtn[power_of_two=true]", "activations[power_of_two=true]"):
        network = resolve("method", *parse(step))(network, space.data(seed=0, trains=False)).eval()
    images = space.images("evaluation").batch(range(64))
    compiled = resolve("runtime", "openvino")().compile(network, images, threads=1)
    with torch.no_grad():
        simulated = network(images).numpy()
    assert compiled.integer_layers == compiled.compute_layers
    np.testing.assert_array_equal(compiled.run(np.ascontiguousarray(images.numpy()))[0], simulated)
