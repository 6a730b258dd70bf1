"""Pruned weights stay zero, whatever quantizes them."""

import pytest
import torch
from torch import nn

from qbench.errors import Unsupported, UserError
from qbench.quant.audit import audit
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, encodings, weight_layers
from qbench.registry import parse, resolve


class Data:
    seed = 0

    def __init__(self):
        self.records = {}

    def record(self, name, values):
        self.records[name] = values


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[3].weight *= 0.1
        model[0].weight[3] = 0  # a dead channel
    return model


def run(model, *steps, data=None):
    for step in steps:
        model = resolve("method", *parse(step))(model, data or Data())
    return model


def shares(model):
    return [float((layer.weight == 0).float().mean()) for layer in weight_layers(model)]


def test_per_layer():
    data, before = Data(), net()
    model = run(net(), "prune[sparsity=0.6]", data=data)
    assert shares(model) == pytest.approx([0.6, 0.6, 0.6], abs=0.005)
    assert data.records["prune"] == pytest.approx(dict(zip(["0", "1", "3"], shares(model), strict=True)))
    for layer, was in zip(weight_layers(model), weight_layers(before), strict=True):
        kept = layer.weight != 0
        assert torch.equal(layer.weight[kept], was.weight[kept])
        assert was.weight[~kept].abs().max() <= was.weight[kept].abs().min()


def test_over_the_network():
    model = run(net(), "prune[sparsity=0.6,granularity=network]")
    counts = [layer.weight.numel() for layer in weight_layers(model)]
    zeros = sum(share * count for share, count in zip(shares(model), counts, strict=True))
    assert zeros == pytest.approx(0.6 * sum(counts), abs=1)
    assert shares(model)[2] > 0.9 > 0.5 > shares(model)[1]


def test_equals_are_not_all_pruned():
    model = nn.Sequential(nn.Linear(10, 10))
    nn.init.constant_(model[0].weight, 0.5)
    assert shares(run(model, "prune[sparsity=0.3]")) == pytest.approx([0.3])
    assert shares(run(net(), "prune[sparsity=0,skip=['0']]"))[1:] == [0, 0]


@pytest.mark.parametrize(
    "quantizer",
    [
        "rtn[bits=4]",
        "rtn[bits=4,symmetric=false,granularity=group,group_size=8]",
        "rtn[bits=3,calibration=mse]",
        "kmeans[bits=3]",
        "kmeans[bits=3,granularity=channel]",
        "kmeans[bits=3,granularity=network,start=linear]",
        "kmeans[bits=1]",
        "ecsq[bits=3]",
        "ecsq[bits=1]",
        "pot",
        "cast",
    ],
)
def test_zeros_survive(quantizer):
    pruned = run(net(), "prune[sparsity=0.7]")
    zeros = [layer.weight == 0 for layer in weight_layers(pruned)]
    model = run(pruned, quantizer, "compress[coder=huffman]" if quantizer != "cast" else "cast")
    assert len(encodings(model)) == 3
    assert all(bool((layer.weight[z] == 0).all()) for layer, z in zip(weight_layers(model), zeros, strict=True))
    assert all(claim["used"] <= claim["levels"] for claim in audit(model).values())


def test_a_step_that_loses_zeros_stops():
    model = run(net(), "prune")
    code = Affine.nearest(model[3].weight, 0.02, low=-8, high=7)
    shifted = Affine(code.codes + 1, code.scale, -7, 8)
    encode(model[3], code)
    with pytest.raises(Unsupported, match="does not keep the zeros of prune"):
        encode(model[3], shifted)


def test_prune_comes_first():
    with pytest.raises(UserError, match=r"prune: 0\.weight is quantized already; put prune in front"):
        run(net(), "rtn", "prune")
