"""Methods with fixed or fitted levels, on a small network."""

import copy
import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

from qbench.quant.audit import audit
from qbench.quant.layers import encodings, output_axis
from qbench.quant.levels import nf4_levels
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


FORMATS = ["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", ["granularity=tensor", "granularity=channel", "granularity=group,group_size=5"])
def test_small_floats(net, format, options):
    found = errors(f"minifloat[format={format},{options}]", net)
    bound = {"8": 3e-3, "6": 5e-3, "4": 5e-2}[format[2]]
    assert max(found) < bound
    assert (net.conv.weight[0] == 0).all()
    assert all(claim["used"] <= claim["levels"] <= 2 ** int(format[2]) for claim in audit(net).values())


def test_the_least_error_of_small_floats(net):
    other = copy.deepcopy(net)
    plain = errors("minifloat[format=fp4_e2m1]", net)
    best = errors("minifloat[format=fp4_e2m1,calibration=mse]", other)
    assert sum(best) < sum(plain)


@pytest.mark.parametrize("format", [*(f"mx{name}" for name in FORMATS), "nvfp4"])
def test_blocks(net, format):
    found = errors(f"mx[format={format},edge_bits=8,skip=[up]]", net)
    assert found[0] < 4e-3
    assert found[1] < 5e-2
    assert found[2] == 0
    assert all(claim["used"] <= claim["levels"] for claim in audit(net).values())
    assert (net.conv.weight[0] == 0).all()
    assert encodings(net)["conv.weight"].inner.values.dtype == (
        torch.float8_e5m2 if "e5m2" in format else torch.float8_e4m3fn
    )


def test_normal_float_levels():
    published = [-1, -0.6961929, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229567, 1]
    assert nf4_levels().tolist() == pytest.approx(published, abs=2e-6)


@pytest.mark.parametrize("options", ["", "double_quantization=false", "block_size=5"])
def test_normal_float(net, options):
    found = errors(f"nf4[{options}]", net)
    assert max(found) < 0.02
    assert (net.conv.weight[0] == 0).all()
    assert (net.head.weight == 0.25).all()
    assert all(claim["used"] <= claim["levels"] == 16 for claim in audit(net).values())


def test_scales_are_stored_in_eight_bits():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1000, 70))
    weight = net[0].weight.detach().clone()
    single = run("nf4[double_quantization=false]", copy.deepcopy(net))[0].weight.detach()
    double = run("nf4", net)[0].weight.detach()
    apart = [float((w - weight).square().mean()) for w in (single, double)]
    assert apart[1] <= apart[0] * 1.01
    tensors = {key: t.numel() * t.element_size() for key, t in encodings(net)["0.weight"].tensors().items()}
    ranges = 4 * math.ceil(70 * 16 / 256)
    assert tensors == {
        "inner.codes": 35_000,
        "inner.levels": 64,
        "scale.codes": 70 * 16,
        "scale.scale": ranges,
        "scale.zero_point": ranges,
    }
