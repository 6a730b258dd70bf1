"""Methods with fixed or fitted levels, on a small network."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from qbench.quant.audit import audit
from qbench.quant.layers import encodings, output_axis
from qbench.registry import parse, resolve


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = {
        "conv": nn.Conv2d(3, 8, 3),
        "depthwise": nn.Conv2d(8, 8, 3, groups=8),
        "up": nn.ConvTranspose2d(8, 4, 2),
        "head": nn.Linear(4, 5),
    }
    model = nn.Sequential(OrderedDict(layers))
    with torch.no_grad():
        model.conv.weight[0] = 0  # a dead channel
        model.head.weight.fill_(0.25)  # a constant layer
    return model.eval()


def run(reference, model):
    return resolve("method", *parse(reference))(model, None)


def errors(reference, model):
    before = [layer.weight.detach().clone() for layer in model]
    run(reference, model)
    after = [layer.weight.detach() for layer in model]
    return [float((q - w).square().mean() / w.square().mean()) for q, w in zip(after, before, strict=True)]


@pytest.mark.parametrize(
    "reference",
    [
        "log2[bits=4]",
        "log2[bits=2,granularity=channel]",
        "quantile[bits=3]",
        "quantile[bits=3,granularity=channel]",
        "lloyd_max[bits=3]",
        "lloyd_max[bits=3,granularity=tensor]",
        "lloyd_max[bits=1,distribution=empirical]",
    ],
)
def test_codes_are_true_and_weights_near(net, reference):
    found = errors(reference, net)
    assert all(claim["used"] <= claim["levels"] for claim in audit(net).values())
    assert len(encodings(net)) == 4
    assert max(found) < 0.6
    if "bits=3" in reference:
        assert max(found[:3]) < 0.1
    assert net.up.weight.shape == (8, 4, 2, 2)
    assert output_axis(net.up) == 1


def test_edges_and_skipped_layers(net):
    run("quantile[bits=2,edge_bits=4,skip=[up]]", net)
    found = encodings(net)
    assert set(found) == {"conv.weight", "depthwise.weight", "head.weight"}
    assert found["conv.weight"].levels.shape[-1] == 16
    assert found["depthwise.weight"].levels.shape[-1] == 4
