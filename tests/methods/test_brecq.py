"""BRECQ and QDrop: blocks against layers, given quantizers, what is kept and what is refused."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.methods.activations import activations
from qbench.methods.brecq import brecq
from qbench.methods.qdrop import qdrop
from qbench.methods.rtn import rtn
from qbench.quant.activations import DynamicQuantizer, StaticQuantizer, input_quantizers, quantize_input
from qbench.quant.encodings import Affine
from qbench.quant.layers import encodings, named_weight_layers
from qbench.quant.matmuls import operands
from qbench.quant.sweep import sweep


class Noise:
    def __init__(self, images: int = 24, size: int = 16) -> None:
        self.x = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


def data_for(model: nn.Module, records: dict[str, Any] | None = None, images: int = 24, seed: int = 0) -> Data:
    store = {} if records is None else records
    batches = Batches(Noise(images), torch.device("cpu"), batch_size=8)
    return Data(
        batches,
        None,
        nn.functional.cross_entropy,
        reference=copy.deepcopy(model),
        record=store.__setitem__,
        seed=seed,
    )


def output_error(model: nn.Module, original: nn.Module) -> float:
    with torch.no_grad():
        x = Noise().x
        return float((model(x) - original(x)).norm() / original(x).norm())


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("test_resnet").eval()


def test_brecq_is_nearer_to_float_than_rounding(network: nn.Module) -> None:
    records: dict[str, Any] = {}
    model = brecq(copy.deepcopy(network), data_for(network, records), bits=3, steps=60, batch_size=8)
    attached = encodings(model)
    assert attached.keys() == {f"{name}.weight" for name in named_weight_layers(model)}
    assert all(isinstance(e, Affine) and (e.low, e.high) == (0, 7) for e in attached.values())
    assert {"layer1.0", "layer4.0", "fc"} <= records["reconstruction_error"].keys()
    assert all(kept <= start for start, kept in records["reconstruction_error"].values())
    rounded = rtn(copy.deepcopy(network), data_for(network), bits=3, symmetric=False, calibration="mse")
    assert output_error(model, network) < 0.8 * output_error(rounded, network)


def test_qdrop_quantizes_inputs_and_is_nearer_than_rounding(network: nn.Module) -> None:
    model = qdrop(
        copy.deepcopy(network), data_for(network), bits=4, activation_bits=4, steps=60, batch_size=8, edge_bits=8
    )
    quantizers = input_quantizers(model)
    assert quantizers.keys() == named_weight_layers(model).keys()
    assert all(isinstance(q, StaticQuantizer) for q in quantizers.values())
    assert [q.bits for q in quantizers.values()] == [8] + [4] * (len(quantizers) - 2) + [8]
    rounded = rtn(copy.deepcopy(network), data_for(network), bits=4, symmetric=False, calibration="mse", edge_bits=8)
    rounded = activations(rounded, data_for(network), bits=4, calibration="mse", edge_bits=8)
    assert output_error(model, network) < 0.9 * output_error(rounded, network)


def test_the_error_of_the_last_layer_is_that_of_the_whole_network(network: nn.Module) -> None:
    """So the sweep goes on with the input quantizers that a unit got."""
    records: dict[str, Any] = {}
    model = qdrop(copy.deepcopy(network), data_for(network, records), bits=4, activation_bits=3, steps=2, batch_size=8)
    assert records["reconstruction_error"]["fc"][1] == pytest.approx(output_error(model, network) ** 2, rel=1e-3)


def test_given_quantizers_are_kept_and_static_ones_learned(network: nn.Module) -> None:
    model = activations(copy.deepcopy(network), data_for(network), bits=3)
    dynamic = DynamicQuantizer(4)
    quantize_input(model.get_submodule("layer1.0.conv2"), dynamic)
    before = {name: q.scale.item() for name, q in input_quantizers(model).items() if isinstance(q, StaticQuantizer)}
    reference_error = output_error(rtn(copy.deepcopy(model), data_for(network), bits=4), network)
    model = brecq(model, data_for(network), bits=4, steps=40, batch_size=8)
    after = input_quantizers(model)
    assert after.keys() == named_weight_layers(model).keys()
    assert after["layer1.0.conv2"] is dynamic
    assert all(isinstance(after[name], StaticQuantizer) for name in before)
    assert any(after[name].scale.item() != scale for name, scale in before.items())
    assert output_error(model, network) < reference_error


def test_they_are_the_same_for_a_seed(network: nn.Module) -> None:
    first, second, other = (
        qdrop(copy.deepcopy(network), data_for(network, seed=seed), steps=30, batch_size=8) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_one_image_dead_channels_and_transposed_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0
    original = copy.deepcopy(model.eval())
    model = qdrop(model, data_for(original, images=1), steps=10, skip=("3",))
    assert encodings(model).keys() == {"0.weight", "2.weight"}
    assert output_error(model, original) < 1


def test_another_structure_is_refused() -> None:
    reference = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    model = nn.Sequential(nn.Conv2d(3, 5, 3)).eval()
    with pytest.raises(Unsupported, match=r"^0 has another shape"):
        brecq(model, data_for(reference), steps=2)


def test_a_quantizer_attached_at_a_stop_is_in_effect_at_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    coarse = StaticQuantizer(2, False, 1.0, 1)
    for stop in sweep(model, [Noise(4).x], walk_reference=False):
        if stop.name == "0":
            quantize_input(stop.layer, coarse)
        else:
            with torch.no_grad():
                expected = model[0](Noise(4).x)
            torch.testing.assert_close(stop.inputs[0], expected)


def test_learned_codes_start_from_given_ones_and_are_nearer_to_float(network: nn.Module) -> None:
    rounded = rtn(copy.deepcopy(network), data_for(network), bits=3, symmetric=False, calibration="mse")
    start = output_error(rounded, network)
    given = {name: (e.low, e.high) for name, e in encodings(rounded).items() if isinstance(e, Affine)}
    records: dict[str, Any] = {}
    model = brecq(
        rounded, data_for(network, records), bits=8, start="given", learn="codes", steps=60, batch_size=8, lr=0.03
    )
    attached = encodings(model)
    assert {name: (e.low, e.high) for name, e in attached.items() if isinstance(e, Affine)} == given
    assert all(kept <= before for before, kept in records["reconstruction_error"].values())
    assert output_error(model, network) < 0.7 * start
    assert not torch.equal(model.get_submodule("fc").bias, network.get_submodule("fc").bias)
    model.load_state_dict({**model.state_dict(), **{name: e.decode() for name, e in attached.items()}})


def test_learned_codes_from_nearest_with_dropped_inputs(network: nn.Module) -> None:
    model = qdrop(
        copy.deepcopy(network),
        data_for(network),
        bits=4,
        activation_bits=4,
        learn="codes",
        steps=40,
        batch_size=8,
        edge_bits=8,
    )
    rounded = rtn(copy.deepcopy(network), data_for(network), bits=4, symmetric=False, calibration="mse", edge_bits=8)
    rounded = activations(rounded, data_for(network), bits=4, calibration="mse", edge_bits=8)
    assert output_error(model, network) < 0.9 * output_error(rounded, network)


def test_learning_that_does_not_help_is_undone() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    model = brecq(copy.deepcopy(original), data_for(original), learn="codes", steps=5, lr=50.0)
    assert torch.equal(model[0].bias, original[0].bias)


def test_a_given_start_needs_uniform_codes(network: nn.Module) -> None:
    with pytest.raises(Unsupported, match=r"start=given needs quantized layers, but conv1.* has no codes"):
        brecq(copy.deepcopy(network), data_for(network), start="given", steps=1)


def test_steps_of_operands_are_learned_with_their_block() -> None:
    torch.manual_seed(0)
    vit = create_model("test_vit", img_size=16, patch_size=4, num_classes=5).eval()
    given = activations(copy.deepcopy(vit), data_for(vit), bits=4, matmuls=True)
    before = {name: float(q.scale) for name, q in input_quantizers(given).items()}
    model = qdrop(given, data_for(vit), bits=4, activation_bits=4, steps=10, batch_size=8)
    after = {name: float(q.scale) for name, q in input_quantizers(model).items()}
    assert after.keys() == before.keys()
    moved = {name for name in operands(model) if after[name] != before[name]}
    assert len(moved) >= len(operands(model)) / 2 > 0  # a block that learned nothing keeps its start
