"""What a toolkit decided is put on a network exactly, or refused; and a network that was misread is found."""

import copy
import sys

import pytest
import torch
from torch import nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.models.base import cross_entropy
from qbench.quant.activations import ChannelQuantizer, StaticQuantizer, input_quantizer, quantize_input
from qbench.quant.encodings import Affine
from qbench.toolkits.adopt import prepare, put_parameters, put_quantizer, require
from qbench.toolkits.agreement import TOLERANCE, compare
from qbench.toolkits.places import Grid


class Images:
    def __len__(self):
        return 8

    def batch(self, positions):
        return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))[list(positions)]


BATCHES = Batches(Images(), torch.device("cpu"))


def network():
    return nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten()).eval()


def test_a_toolkit_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(Unsupported, match=r"^nncf is not installed: pip install 'qbench\[nncf\]'$"):
        require("nncf", extra="nncf")


def test_a_toolkit_that_is_broken_shows_its_error(monkeypatch, tmp_path):
    (tmp_path / "broken_toolkit.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        require("broken_toolkit", extra="it")


def test_networks_that_are_quantized_already_are_refused():
    model = network()
    quantize_input(model[2], StaticQuantizer())
    with pytest.raises(Unsupported, match="put it in front of other methods"):
        prepare(model, Data(BATCHES, None, cross_entropy))


@pytest.mark.parametrize(
    ("grid", "quantizer"),
    [
        (Grid((0.5,), (0,), -128, 127), StaticQuantizer(8, True, 0.5)),
        (Grid((0.5,), (128,), 0, 255), StaticQuantizer(8, True, 0.5)),
        (Grid((0.5,), (-3,), -128, 127), StaticQuantizer(8, False, 0.5, 125)),
        (Grid((0.5,), (0,), 0, 127), StaticQuantizer(7, False, 0.5)),
    ],
)
def test_quantizers(grid, quantizer):
    model = network()
    put_quantizer(model, "2", grid, "it")
    x = torch.linspace(-70, 140, 50).reshape(1, 2, 5, 5)
    assert torch.equal(input_quantizer(model[2])(x), quantizer(x))
    levels = (x / 0.5).round().add(grid.zero_point[0]).clamp(grid.low, grid.high).sub(grid.zero_point[0]) * 0.5
    assert torch.equal(quantizer(x), levels)


def test_a_scale_for_each_channel_and_odd_numbers_of_levels():
    model = network()
    put_quantizer(model, "2", Grid((0.5, 0.25), (-128, 0), -128, 127), "it")
    quantizer = input_quantizer(model[2])
    assert isinstance(quantizer, ChannelQuantizer)
    assert quantizer.zero_point.tolist() == [0, 128]
    with pytest.raises(Unsupported, match="it quantizes the input of 2 to 255 levels"):
        put_quantizer(model, "2", Grid((0.5,), (0,), -127, 127), "it")


def test_biases_where_there_were_none_and_parameters_that_do_not_exist():
    model = network()
    put_parameters(model, {"0.bias": torch.zeros(2)}, "it")
    assert model[0].bias is None
    put_parameters(model, {"0.bias": torch.tensor([1.0, 2.0])}, "it")
    assert model[0].bias.tolist() == [1.0, 2.0]
    with pytest.raises(Unsupported, match=r"it quantizes a weight of 1 \(ReLU\)"):
        put_parameters(model, {"1.weight": torch.zeros(1)}, "it")


def test_shared_weights_have_the_same_codes_or_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    codes = [Affine.nearest(model[0].weight, step, bits=4) for step in (0.1, 0.2)]
    put_parameters(model, {"0.weight": codes[0], "1.weight": codes[0]}, "it")
    with pytest.raises(Unsupported, match=r"0.weight in another way than the layer that it is shared with"):
        put_parameters(model, {"0.weight": codes[0], "1.weight": codes[1]}, "it")


def quantized(places):
    torch.manual_seed(0)
    model = network()
    for place in places:
        quantize_input(model[place], StaticQuantizer(4, True, 0.25))
    return model


def test_a_network_that_was_misread_is_found():
    floats, toolkits = quantized([]), quantized([0, 2])
    told = compare(quantized([0, 2]), toolkits, floats, BATCHES, "it")
    assert told.pop("nudged") < 1e-4
    assert told == {"distance": 0.0, "with_its_rounding": 0.0, "same_guess": 1.0, "images": 8}
    for places in ([0], [2], []):
        with pytest.raises(Unsupported, match="the network as read from it answers unlike it's own"):
            compare(quantized(places), toolkits, floats, BATCHES, "it")


def test_a_network_that_the_order_of_sums_moves_far_may_be_as_far_from_the_toolkits():
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Linear(6, 6))
    model = copy.deepcopy(floats)
    quantize_input(model[2], StaticQuantizer(4, False, 0.25, 8))
    toolkits = copy.deepcopy(model)
    with torch.no_grad():  # every sum lies between two codes: a millionth decides
        for net in (floats, model, toolkits):
            net[1].weight.zero_()
            net[1].bias.fill_(0.625)
        toolkits[1].bias.mul_(1 + 1e-6)
    nudged = compare(model, toolkits, floats, BATCHES, "it")["nudged"]
    assert nudged > TOLERANCE
    with torch.no_grad():
        toolkits[2].weight.mul_(9)
    with pytest.raises(Unsupported, match="answers unlike it's own"):
        compare(model, toolkits, floats, BATCHES, "it")


def test_values_halfway_may_be_rounded_in_another_way():
    floats, model = nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity())
    quantize_input(model[0], StaticQuantizer(4, False, 1.0, 7))

    class Halves(Images):
        def batch(self, positions):
            return super().batch(positions).round() + 0.5

    def rounded(x, scale, zero):
        return (x / scale + zero).round()

    batches = Batches(Halves(), torch.device("cpu"))
    toolkits = copy.deepcopy(floats)
    toolkits.forward = lambda x: rounded(x, 1.0, 7).clamp(0, 15) - 7
    told = compare(model, toolkits, floats, batches, "it", rounded)
    assert told["with_its_rounding"] == 0
    assert told["distance"] == pytest.approx(2)
    with pytest.raises(Unsupported):
        compare(model, toolkits, floats, batches, "it")
