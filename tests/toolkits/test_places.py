"""A toolkit's quantizers find the modules whose inputs they quantize, or are refused."""

import pytest
import torch
from torch import nn

from qbench.errors import Unsupported
from qbench.quant.edges import Join
from qbench.quant.outputs import OUTPUT
from qbench.toolkits.places import Graph, Grid, Step

A, B = Grid((0.1,), (0,), 0, 255), Grid((0.2,), (3,), 0, 255)
CHANNELS = Grid((0.1, 0.2), (0, 0), 0, 255)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.pool, self.sum0 = nn.Conv2d(3, 2, 1), nn.ReLU6(), nn.AvgPool2d(2), Join("add", 2)
        self.block = nn.Sequential(nn.Conv2d(2, 2, 1))


def quantizers(*steps, outputs=()):
    """Of a graph whose values are called by their numbers, and which is called with `x`."""
    return Graph("it", {str(i): step for i, step in enumerate(steps)}, outputs).quantizers(Net())


def q(source, grid=A):
    return Step("quantizer", "quantize", (source,), grid=grid)


def through(source, kind="through"):
    return Step(kind, kind, (source,))


def layer(source, module="conv"):
    return Step("layer", "conv2d", (source,), module)


def other(module, *sources):
    return Step("other", "operation", sources, module)


def test_inputs_of_layers_and_of_modules_that_are_one_operation():
    assert quantizers(q("x"), layer("0"), q("1", B), other("pool", "2")) == {"conv": A, "pool": B}


def test_both_sides_of_a_sum():
    assert quantizers(q("x"), q("x", B), other("sum0", "0", "1")) == {"sum0.edges.0": A, "sum0.edges.1": B}
    assert quantizers(q("x"), other("sum0", "x", "0")) == {"sum0.edges.1": A}


def test_what_commutes_is_passed():
    steps = q("x"), through("0"), through("1", "moves"), layer("2")
    assert quantizers(*steps) == {"conv": A}
    assert quantizers(q("x", CHANNELS), through("0"), layer("1")) == {"conv": CHANNELS}


def test_channels_that_are_moved_are_refused():
    with pytest.raises(Unsupported, match="it moves channels that have a scale each, in front of 1"):
        quantizers(q("x", CHANNELS), through("0", "moves"), layer("1"))


def test_the_same_grid_twice_is_one_quantizer_and_two_grids_are_refused():
    assert quantizers(q("x"), through("0"), q("1"), layer("2")) == {"conv": A}
    with pytest.raises(Unsupported, match="two quantizers in a row"):
        quantizers(q("x"), through("0"), q("1", B), layer("2"))


def test_two_calls_of_a_layer_have_one_quantizer_or_are_refused():
    assert quantizers(q("x"), layer("0"), q("1"), layer("2")) == {"conv": A}
    with pytest.raises(Unsupported, match="the input of conv in two ways"):
        quantizers(q("x"), layer("0"), q("1", B), layer("2"))


def test_the_output():
    assert quantizers(layer("x"), q("0"), outputs=("1",)) == {OUTPUT: A}
    assert quantizers(layer("x"), outputs=("0",)) == {}
    with pytest.raises(Unsupported, match="an output, of which the network has several"):
        quantizers(layer("x"), q("0"), outputs=("0", "1"))


@pytest.mark.parametrize(
    "steps",
    [
        (q("x"), other("", "0")),
        (q("x"), other("block", "0")),
        (q("x"), other("pool", "x", "0")),
        (other("act", "x"), q("0"), other("act", "1")),
    ],
)
def test_edges_that_are_no_modules_input_are_refused(steps):
    with pytest.raises(Unsupported, match="it quantizes an operand of operation inside of"):
        quantizers(*steps)


def test_parameters_of_two_calls_must_be_the_same():
    def graph(second):
        steps = (Step("layer", "conv", ("x",), "conv", parameters={"bias": torch.tensor(v)}) for v in ([1.0], second))
        return Graph("it", dict(enumerate(steps)), ())

    assert list(graph([1.0]).parameters()) == ["conv.bias"]
    with pytest.raises(Unsupported, match=r"it quantizes conv.bias in two ways"):
        graph([2.0]).parameters()
