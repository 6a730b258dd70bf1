"""Methods that need no images, and activation quantizers, on small networks."""

from typing import get_args

import pytest
import torch
from torch import nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported, UserError
from qbench.quant.activations import (
    DynamicQuantizer,
    StaticQuantizer,
    input_quantizer,
    input_quantizers,
    quantize_input,
)
from qbench.quant.audit import audit
from qbench.quant.encodings import Affine, Cast, Codebook
from qbench.quant.layers import encodings
from qbench.quant.observers import Calibration, WeightCalibration
from qbench.registry import parse, resolve


class Images:
    def __init__(self, count=20):
        self.x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def batch(self, positions):
        return self.x[list(positions)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.up(self.depthwise(self.conv(x).relu()).relu()).relu()
        return self.head(x.flatten(2).transpose(1, 2)).mean(1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.conv.weight[0] = 0  # a dead channel
    return model


@pytest.fixture
def data():
    records = {}
    found = Data(Batches(Images(), torch.device("cpu"), 8), None, None, record=records.__setitem__)
    found.records = records
    return found


def run(reference, model, data):
    return resolve("method", *parse(reference))(model, data)


def test_fp32_changes_nothing(net, data):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = run("fp32", net, data)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not encodings(model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3", "float8_e5m2"])
def test_cast_stays_finite(net, data, dtype):
    with torch.no_grad():
        net.head.weight[0, 0] = 1e20
    model = run(f"cast[dtype={dtype}]", net, data)
    assert all(isinstance(code, Cast) for code in encodings(model).values())
    assert model.head.weight.isfinite().all()
    assert model.head.weight[0, 0] > 400


@pytest.mark.parametrize(
    "options",
    ["", "symmetric=false", "granularity=tensor", *(f"calibration={name}" for name in get_args(WeightCalibration))],
)
def test_rtn(net, data, options):
    before = net.conv.weight.detach().clone()
    model = run(f"rtn[bits=5,{options}]", net, data)
    assert set(encodings(model)) == {f"{n}.weight" for n in ("conv", "depthwise", "up", "unused", "head")}
    assert all(entry["used"] <= entry["levels"] <= 32 for entry in audit(model).values())
    assert (model.conv.weight - before).abs().max() < 0.05 * before.abs().max()
    assert (model.conv.weight[0] == 0).all()


def test_rtn_is_idempotent(net, data):
    once = {k: v.clone() for k, v in run("rtn[bits=4]", net, data).state_dict().items()}
    twice = run("rtn[bits=4]", net, data).state_dict()
    assert all(torch.allclose(once[key], twice[key], atol=1e-7) for key in once)


def test_rtn_groups_and_policy(net, data):
    model = run("rtn[bits=3,granularity=group,group_size=5,edge_bits=8,skip=[up,depthwise]]", net, data)
    found = encodings(model)
    assert set(found) == {"conv.weight", "unused.weight", "head.weight"}
    assert found["conv.weight"].scale.shape == (8, 6)  # 27 columns
    assert [found[k].levels for k in ("conv.weight", "unused.weight", "head.weight")] == [255, 7, 255]


def test_transposed_convolutions_have_output_channels_on_axis_1(net, data):
    code = encodings(run("rtn", net, data))["up.weight"]
    assert isinstance(code, Affine)
    assert (code.axis, code.scale.shape) == (1, (4, 1))


@pytest.mark.parametrize(
    ("method", "bits"), [("pot", 2), ("pot", 4), ("pot", 6), ("apot", 2), ("apot", 4), ("apot", 7)]
)
def test_powers_of_two(net, data, method, bits):
    model = run(f"{method}[bits={bits}]", net, data)
    for code in encodings(model).values():
        assert isinstance(code, Codebook)
        assert code.levels.shape == (1, 1, 2**bits - 1)
    assert all(entry["used"] <= entry["levels"] for entry in audit(model).values())
    if method == "pot":
        ratio = model.head.weight.detach()[0] / encodings(model)["head.weight"].scale[0]
        exponent = ratio[ratio != 0].abs().double().log2()
        assert torch.allclose(exponent, exponent.round(), atol=1e-5)


@pytest.mark.parametrize("granularity", ["network", "layer", "channel"])
@pytest.mark.parametrize("start", ["optimal", "linear", "kmeans++"])
def test_kmeans(net, data, granularity, start):
    before = net.conv.weight.detach().clone()
    model = run(f"kmeans[bits=3,granularity={granularity},start={start}]", net, data)
    assert all(entry["used"] <= entry["levels"] <= 8 for entry in audit(model).values())
    assert (model.conv.weight - before).square().mean() < 0.1 * before.square().mean()
    if granularity == "network":
        used = torch.cat([m.weight.flatten() for m in (model.conv, model.depthwise, model.up, model.head)])
        assert used.unique().numel() <= 8


@pytest.mark.parametrize("calibration", get_args(Calibration))
def test_static_activations(net, data, calibration):
    x = data.example
    before = net(x)
    model = run(f"activations[calibration={calibration}]", net, data)
    assert set(input_quantizers(model)) == {"conv", "depthwise", "up", "head"}
    assert data.records["activations"]["unreached"] == ["unused"]
    assert model.depthwise.input_quantizer.zero_point == 0  # after a ReLU
    assert model.conv.input_quantizer.zero_point > 0
    assert (model(x) - before).abs().max() < 0.05
    assert all(len(layer._forward_pre_hooks) == 1 for layer in (model.conv, model.head))


def test_scales_that_are_powers_of_two(net, data):
    model = run("activations[power_of_two=true]", run("rtn[power_of_two=true,bits=4,symmetric=false]", net, data), data)
    scales = [code.scale for code in encodings(model).values()]
    scales += [quantizer.scale.reshape(1, 1) for quantizer in input_quantizers(model).values()]
    assert all(torch.equal(scale.log2(), scale.log2().round()) for scale in scales)


def test_minmax_covers_all_batches(net, data):
    model = run("activations", net, data)
    images = data.calibration.source.x
    span = float(images.max().clamp(min=0) - images.min().clamp(max=0))
    assert float(model.conv.input_quantizer.scale) == pytest.approx(span / 255, rel=1e-5)


def test_activations_again_start_from_the_float_inputs(net, data):
    fine = run("activations[bits=8]", net, data).conv.input_quantizer.scale.clone()
    coarse = run("activations[bits=2]", net, data).conv.input_quantizer
    assert coarse.bits == 2
    again = run("activations[bits=8]", net, data).conv.input_quantizer
    assert torch.equal(again.scale, fine)


def test_other_quantizers_stay(net, data):
    quantize_input(net.head, StaticQuantizer(3, True, 0.5))
    model = run("activations[skip=[head]]", net, data)
    assert model.head.input_quantizer.bits == 3
    assert model.conv.input_quantizer.bits == 8


def test_symmetric_codes_where_there_are_negative_values(net, data):
    model = run("activations[symmetric=true,edge_bits=32]", net, data)
    assert set(input_quantizers(model)) == {"depthwise", "up"}
    model = run("activations[symmetric=true]", net, data)
    assert model.conv.input_quantizer.symmetric
    assert not model.depthwise.input_quantizer.symmetric


def test_dynamic_activations(net, data):
    model = run("activations[mode=dynamic,granularity=token]", net, data)
    assert isinstance(input_quantizer(model.head), DynamicQuantizer)
    assert (model.head.input_quantizer.granularity, model.conv.input_quantizer.granularity) == ("token", "tensor")
    assert "unused" not in input_quantizers(model)


def test_tokens_that_cannot_be(net, data):
    with pytest.raises(Unsupported, match="mode=dynamic"):
        run("activations[granularity=token]", net, data)
    with pytest.raises(Unsupported, match="linear layers"):
        run("activations[granularity=token,mode=dynamic]", nn.Sequential(nn.Conv2d(3, 3, 1)), data)


def test_calibration_does_not_train_batch_norms(data):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).train()
    before = model[1].running_mean.clone()
    model = run("activations", model, data)
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize(
    "reference",
    [
        "rtn[bits=1]",
        "rtn[bits=17]",
        "rtn[edge_bits=20]",
        "rtn[group_size=0]",
        "pot[bits=7]",
        "kmeans[bits=9]",
        "rtn[percentile=101]",
        "activations[mode=static_]",
    ],
)
def test_impossible_options(reference):
    with pytest.raises(UserError, match="option"):
        resolve("method", *parse(reference))
