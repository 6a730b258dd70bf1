"""PyTorch runs float networks, in either layout, compiles integer ones, and passes off no simulation as integers."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from qbench import registry
from qbench.errors import Unsupported, UserError
from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, weight_of
from qbench.runtimes.base import Compiled

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def _compile(model: nn.Module, x: torch.Tensor, reference: str = "torch", threads: int = 1) -> Compiled:
    engine = registry.resolve("runtime", *registry.parse(reference))()
    compiled: Compiled = engine.compile(model, x, threads=threads)
    return compiled


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


@pytest.mark.parametrize("options", ["", "[memory_format=contiguous]"])
def test_float_networks_answer_as_they_do(options: str) -> None:
    model, x = _network(), torch.randn(2, 3, 8, 8)
    compiled = _compile(model, x, f"torch{options}")
    assert (compiled.integer_layers, compiled.compute_layers, compiled.claimed_layers) == (0, 2, ())
    np.testing.assert_allclose(compiled.run(x.numpy())[0], model(x).detach().numpy(), atol=1e-6)


def test_the_layout_is_that_of_the_option() -> None:
    seen: list[bool] = []
    model, x = _network(), torch.randn(2, 3, 8, 8)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    for options in ("[memory_format=contiguous]", "[memory_format=channels_last]"):
        _compile(model, x, f"torch{options}").run(x.numpy())
    assert seen == [True, False]


def test_it_uses_the_threads_it_is_given() -> None:
    used: list[int] = []
    model, x = _network(), torch.randn(1, 3, 8, 8)
    model.register_forward_pre_hook(lambda *_: used.append(torch.get_num_threads()))
    run = _compile(model, x, threads=2).run
    torch.set_num_threads(1)
    run(x.numpy())
    torch.set_num_threads(1)
    assert used == [2]


def _quantized(*, symmetric: bool = False, bits: int = 8) -> nn.Module:
    model = _network()
    for layer in (model[0], model[3]):
        encode(layer, Affine.nearest(weight_of(layer), 0.01, bits=8))
        quantize_input(layer, StaticQuantizer(bits, symmetric, 0.1, 0 if symmetric else 3))
    return model


def test_a_simulation_is_refused() -> None:
    model = _quantized()[:1]
    with pytest.raises(Unsupported, match=r"none of the 1 integer layers unless it compiles: torch\[compile=true\]"):
        _compile(model, torch.randn(1, 3, 8, 8))


def test_a_network_that_cannot_be_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(network: nn.Module, **_: object) -> object:
        def run(_: torch.Tensor) -> None:
            raise RuntimeError("no compiler\nand much more")

        return run

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(Unsupported, match=r"PyTorch cannot compile the network: no compiler$"):
        _compile(_network(), torch.randn(1, 3, 8, 8), "torch[compile=true]")


def test_integer_kernels_need_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(Unsupported, match=r"torchao is not installed: pip install 'qbench\[torchao\]'"):
        _compile(_quantized(), torch.randn(1, 3, 8, 8), "torch[compile=true]")


@pytest.mark.slow
@pytest.mark.parametrize(("symmetric", "bits"), [(False, 8), (True, 8), (False, 4)])
def test_compiled_integers_answer_as_they_are_simulated(symmetric: bool, bits: int) -> None:
    pytest.importorskip("torchao", reason="torchao, an optional package, is not installed")
    model, x = _quantized(symmetric=symmetric, bits=bits), torch.randn(2, 3, 8, 8)
    compiled = _compile(model, x, "torch[compile=true]")
    assert (compiled.integer_layers, compiled.compute_layers, compiled.claimed_layers) == (2, 2, ("0", "3"))
    np.testing.assert_allclose(compiled.run(x.numpy())[0], model(x).detach().numpy(), atol=1e-4)


def test_unknown_options_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="has no option 'format'"):
        _compile(_network(), torch.randn(1, 3, 8, 8), "torch[format=contiguous]")


@pytest.mark.slow
def test_compiled_networks_answer_alike() -> None:
    model, x = _network(), torch.randn(2, 3, 8, 8)
    compiled = _compile(model, x, "torch[compile=true]")
    np.testing.assert_allclose(compiled.run(x.numpy())[0], model(x).detach().numpy(), atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(Unsupported, match="no GPU"):
        _compile(_network(), torch.randn(1, 3, 8, 8), "torch[device=cuda]")


@gpu
@pytest.mark.parametrize("options", ["", ",compile=true"])
def test_a_gpu_answers_as_the_cpu_does(options: str) -> None:
    model, x = _network(), torch.randn(2, 3, 8, 8)
    run = _compile(model, x, f"torch[device=cuda{options}]").run
    np.testing.assert_allclose(run(x.numpy())[0], model(x).detach().numpy(), atol=1e-4)


@gpu
def test_a_gpu_has_no_integer_kernels() -> None:
    with pytest.raises(Unsupported, match="unless it compiles"):
        _compile(_quantized(), torch.randn(2, 3, 8, 8), "torch[device=cuda,compile=true]")
