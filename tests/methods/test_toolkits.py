"""Baselines from other toolkits: known answers on a network of four layers, and their own networks' answers."""

import copy
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.models.base import cross_entropy
from qbench.quant.activations import ChannelQuantizer, StaticQuantizer, input_quantizers
from qbench.quant.encodings import Affine
from qbench.quant.layers import encodings
from qbench.registry import parse, resolve


class Images:
    """Uniform noise that reaches from -1 to 2."""

    def __len__(self) -> int:
        return 8

    def batch(self, positions: Any) -> torch.Tensor:
        x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 - 1
        x[0, 0, 0, :2] = torch.tensor([-1.0, 2.0])
        return x[list(positions)]


class Net(nn.Module):
    """Padding at one side, a residual sum, a pooling layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = Conv2dSame(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)
        self.deep, self.act = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU6()
        self.point, self.pool, self.head = nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.deep(self.norm(self.stem(x)).relu()))
        return self.head(self.pool(self.point(x) + x).flatten(1))


LAYERS = ["stem", "deep", "point", "head"]


def run(case: str, model: nn.Module) -> dict[str, Any]:
    """Quantize the model; what was recorded."""
    records: dict[str, Any] = {}
    batches = Batches(Images(), torch.device("cpu"), batch_size=4)
    reference = copy.deepcopy(model).eval()
    data = Data(batches, None, cross_entropy, reference=reference, record=records.__setitem__)
    try:
        resolve("method", *parse(case))(model, data)
    except Unsupported as error:
        if "is not installed" in str(error):
            pytest.skip(str(error))
        raise
    return records


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.running_var.fill_(0.3)
    return model


def codes(model: nn.Module, name: str) -> Affine:
    encoding = encodings(model)[f"{name}.weight"]
    assert isinstance(encoding, Affine)
    return encoding


def folded(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    return resolve("method", "fold_bn")(model, Data(Batches(Images(), torch.device("cpu")), None, cross_entropy))


CASES = {
    "nncf_ptq": ("nncf", 0.05),
    "nncf_ptq[preset=mixed]": ("nncf", 0.05),
    "nncf_ptq[backend=torch]": ("nncf", 0.0),
    "nncf_ptq[backend=torch,preset=mixed,fast_bias_correction=false]": ("nncf", 0.0),
    "torchao_pt2e": ("torchao", 0.0),
    "ort_static": ("onnxruntime", 0.05),
    "ort_static[calibration=entropy,granularity=tensor]": ("onnxruntime", 0.05),
    "ort_static[calibration=percentile,places=inputs]": ("onnxruntime", 0.05),
    "brevitas": ("brevitas", 0.0),
    "brevitas[bits=4,activation_bits=6,edge_bits=8,rounding=gptq]": ("brevitas", 0.0),
    "brevitas[bits=4,rounding=gpfq,bias_correction=false]": ("brevitas", 0.0),
    "brevitas[bits=4,rounding=learned_round,steps=3]": ("brevitas", 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_network_answers_as_the_toolkits_own(case: str) -> None:
    model = network()
    records = run(case, model)
    name, apart = CASES[case]
    assert records["toolkit"]["name"] == name
    assert records["toolkit"]["version"][0].isdigit()
    assert records["agreement"]["with_its_rounding"] <= apart
    assert records["float_weights"] == []
    assert records["float_inputs"] == []
    assert isinstance(model.norm, nn.Identity)
    for layer in LAYERS:
        code = codes(model, layer)
        assert code.codes.min() >= code.low
        assert code.codes.max() <= code.high


@pytest.mark.parametrize(
    ("case", "low", "high", "step"),
    [
        ("ort_static", -128, 127, 127.5),
        ("torchao_pt2e", -128, 127, 127.5),
        ("brevitas", -127, 127, 127),
    ],
)
def test_scales_of_weights_are_the_toolkits(case: str, low: int, high: int, step: float) -> None:
    model = network()
    weight = folded(model).head.weight.detach()
    run(case, model)
    code = codes(model, "head")
    assert (code.low, code.high) == (low, high)
    assert torch.allclose(code.scale[:, 0] * step, weight.abs().amax(1), rtol=5e-3)
    assert (code.decode() - weight).abs().max() <= code.scale.max() / 2 * 1.02


def test_onnxruntime_quantizes_every_edge_from_the_least_to_the_greatest_value() -> None:
    model = network()
    records = run("ort_static", model)
    images = input_quantizers(model)["stem"]
    assert isinstance(images, StaticQuantizer)
    assert float(images.scale) == pytest.approx(3 / 255, rel=1e-4)
    assert int(images.zero_point) == 85
    assert records["quantized_elsewhere"] == ["pool", "join0.edges.0", "join0.edges.1", "network_output"]


def test_onnxruntime_quantizes_inputs_alone_if_asked_to() -> None:
    model = network()
    # The sum reads what the convolution reads.
    assert run("ort_static[places=inputs]", model)["quantized_elsewhere"] == ["join0.edges.1"]


def test_nncf_has_ranges_for_the_channels_of_depthwise_convolutions_and_corrects_biases() -> None:
    model = network()
    before = folded(model)
    records = run("nncf_ptq", model)
    assert isinstance(input_quantizers(model)["deep"], ChannelQuantizer)
    assert records["quantized_elsewhere"]
    assert any(not torch.equal(model.get_submodule(n).bias, before.get_submodule(n).bias) for n in LAYERS)


def test_brevitas_gives_the_widths_that_were_asked_for() -> None:
    model = network()
    run("brevitas[bits=4,activation_bits=6,edge_bits=8,skip=[head,point]]", model)
    assert {name: code.levels for name, code in encodings(model).items()} == {"stem.weight": 255, "deep.weight": 15}
    assert {name: q.bits for name, q in input_quantizers(model).items()} == {"stem": 8, "deep": 6}
