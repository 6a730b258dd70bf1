"""Structural methods change weights and modules, and leave the float function and its replay intact."""

import copy
from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import UserError
from qbench.methods.equalize import equalize
from qbench.methods.fold_bn import fold_bn
from qbench.methods.reparameterize import reparameterize
from qbench.methods.rtn import rtn
from qbench.methods.smooth import smooth
from qbench.methods.split_channels import split_channels
from qbench.quant import structure
from qbench.quant.channel_clip import ChannelClip
from qbench.quant.channels import input_ranges, output_ranges
from qbench.quant.layers import weight_layers, weight_of
from qbench.quant.links import links
from qbench.quant.splitting import halvings, is_split


class Noise:
    def __init__(self, *shape: int) -> None:
        self.x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Any) -> Tensor:
        return self.x[list(positions)]


class Recorded(Data):
    def __init__(self, *shape: int) -> None:
        self.recorded: dict[str, Any] = {}
        self.images = Noise(*shape).x
        batches = Batches(Noise(*shape), torch.device("cpu"))
        super().__init__(batches, None, nn.functional.cross_entropy, record=self.recorded.__setitem__)


def randomized(model: nn.Module) -> nn.Module:
    """Weights, statistics and biases that differ from channel to channel."""
    torch.manual_seed(0)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.LayerNorm) or getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.bias, 0, 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.logspace(-0.4, 0.4, len(module.weight))[torch.randperm(len(module.weight))])
    return model.eval()


def build(architecture: str) -> nn.Module:
    if architecture == "repvgg":
        return tiny_repvgg()
    if architecture == "mobileone":
        return create_model("mobileone_s0", num_classes=5)
    return create_model(architecture, num_classes=5, **({"img_size": 32} if architecture == "test_vit" else {}))


def tiny_repvgg() -> nn.Module:
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    blocks = tuple(ByoBlockCfg(type="rep", d=2, c=c, s=2, gs=0) for c in (8, 16))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), num_classes=5)


def in_float64(model: nn.Module, images: Tensor) -> Tensor:
    """Random networks are so badly conditioned that float32 alone costs half of what a method may."""
    return copy.deepcopy(model).double()(images.double())


@pytest.mark.parametrize(
    ("method", "options", "architecture", "key"),
    [
        (equalize, {}, "mobilenetv2_035", "pairs"),
        (equalize, {"absorb": True}, "mobilenetv2_035", "absorbed"),
        (equalize, {"absorb": True}, "test_resnet", "pairs"),
        (equalize, {}, "repvgg", "pairs"),
        (smooth, {}, "test_vit", "norms"),
        (smooth, {"alpha": 0.8}, "test_convnext", "norms"),
        (reparameterize, {}, "repvgg", "blocks"),
        (reparameterize, {}, "mobileone", "blocks"),
        (split_channels, {"ratio": 0.1}, "mobilenetv2_035", "split"),
        (split_channels, {"ratio": 0.5, "bits": 4}, "test_vit", "split"),
    ],
)
def test_the_float_function_stays_and_is_rebuilt(method: Any, options: Any, architecture: str, key: str) -> None:
    data, model = Recorded(2, 3, 32, 32), randomized(build(architecture))
    if method is equalize:
        if architecture == "repvgg":
            reparameterize(model, data)
        fold_bn(model, data)
    with torch.no_grad():
        before = in_float64(model, data.images)
        method(model, data, **options)
        after = in_float64(model, data.images)
        assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())
        assert data.recorded[method.__name__][key] > 0
        fresh = build(architecture).eval()
        structure.replay(fresh, structure.record(model))
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(data.images), model(data.images))


def test_equalized_channels_have_one_range_on_both_sides() -> None:
    data, model = Recorded(1, 3, 32, 32), randomized(build("mobilenetv2_035"))
    fold_bn(model, data)
    layers = dict(model.named_modules())
    pairs = links(model, data.example)
    equalize(model, data)
    assert data.recorded["equalize"]["change"] < 2e-7
    assert sum(isinstance(module, ChannelClip) for module in model.modules()) > 30
    for pair in pairs:
        own = output_ranges(layers[pair.source], weight_of(layers[pair.source]))
        (reader,) = pair.readers
        torch.testing.assert_close(own, input_ranges(layers[reader], weight_of(layers[reader])), rtol=1e-3, atol=1e-7)


class Wired(nn.Module):
    """Two convolutions, and something about what is between them."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.wiring = wiring
        self.a, self.b, self.act = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.ReLU6()
        self.alias = self.act if wiring == "two names" else None
        if wiring == "tied":
            self.other = nn.Conv2d(3, 8, 3)
            self.other.weight = self.a.weight
        if wiring == "parametrized":
            nn.utils.parametrizations.weight_norm(self.b)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        match self.wiring:
            case "relu":
                return self.b(y.relu()).mean((2, 3))
            case "functional":
                return self.b(nn.functional.relu6(y)).mean((2, 3))
            case "twice":
                return self.act(self.b(self.act(y))).mean((2, 3))
            case "two names":
                return self.b(self.alias(y)).mean((2, 3))
            case "silu":
                return self.b(nn.functional.silu(y)).mean((2, 3))
            case "sum":
                return (self.b(y.relu()) + y.sum(1, keepdim=True)).mean((2, 3))
            case "kept":
                self.last = y.relu()
                return self.b(self.last).mean((2, 3))
            case "called twice":
                return (self.b(y) + self.b(y)).mean((2, 3))
            case "inplace":
                self.b(y)
                return self.b(y.relu_()).mean((2, 3))
        return self.b(y.relu()).mean((2, 3))


WIRINGS = ["functional", "twice", "two names", "silu", "sum", "kept", "called twice", "inplace", "tied", "parametrized"]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_channels_that_somebody_else_sees_are_left_alone(wiring: str) -> None:
    data, model = Recorded(2, 3, 8, 8), Wired(wiring).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    equalize(model, data)
    assert data.recorded["equalize"]["pairs"] == 0
    assert data.recorded["equalize"]["clipped"] == (["a"] if wiring in WIRINGS[:3] else [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pooling_padding_and_views_are_passed() -> None:
    class Passed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Linear(8, 5)
            self.pool = nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.pool(nn.functional.pad(self.a(x).relu(), (1, 1, 1, 1))))
            return self.c(nn.functional.leaky_relu(y).permute(0, 2, 3, 1).flatten(1, 2)).amax(1)

    data, model = Recorded(2, 3, 12, 12), Passed().eval()
    before = model(data.images)
    equalize(model, data, absorb=True)
    found = links(model, data.example)
    assert [(link.source, link.readers) for link in found] == [("a", ("b",)), ("b", ("c",))]
    assert not any(link.shiftable for link in found)
    torch.testing.assert_close(model(data.images), before, rtol=1e-5, atol=1e-6)
    ranges = output_ranges(model.b, weight_of(model.b))
    torch.testing.assert_close(ranges, input_ranges(model.c, weight_of(model.c)), rtol=1e-4, atol=0)


def test_dead_channels_do_not_reach_beyond_the_others() -> None:
    """Neither in the weights that read or write them, nor, where all they write is their bias, in the activations."""
    data, model = Recorded(2, 3, 8, 8), Wired("relu").eval()
    with torch.no_grad():
        model.a.bias.fill_(0.1)
        model.a.weight[2] = 1e-10
        model.a.weight[3] = 0
        model.a.bias[3] = -1
        model.b.weight[:, 2:4] *= 1000
        model.a.weight[4] *= 1000
        model.b.weight[:, 4] = 0
        before = model(data.images)
        equalize(model, data)
        torch.testing.assert_close(model(data.images), before, rtol=1e-5, atol=1e-5)
        written, read = output_ranges(model.a, model.a.weight), input_ranges(model.b, model.b.weight)
    live = [0, 1, 5, 6, 7]
    assert float(written.max()) <= 1.0001 * float(written[live].max())
    assert float(read[3]) <= 1.0001 * float(read[live].max())
    bias = model.a.bias.detach()
    assert float(bias[2]) <= 1.0001 * float(bias[live].max())


def test_high_biases_move_to_the_next_layer() -> None:
    data, model = Recorded(2, 3, 8, 8), Wired("relu").eval()
    with torch.no_grad():
        model.a.bias += 5
        before, high = model(data.images), model.a.bias.clone()
        equalize(model, data, absorb=True)
        torch.testing.assert_close(model(data.images), before, rtol=1e-5, atol=1e-5)
        assert data.recorded["equalize"]["absorbed"] == 8
        assert float(model.a(data.images).amin()) == pytest.approx(0, abs=1e-5)
        assert float(model.a.bias.abs().mean()) < float(high.abs().mean()) / 2


def test_smoothing_shares_outliers_between_activations_and_weights() -> None:
    """With alpha 1/2 each channel reaches equally far in the activations and in the weights."""
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)).eval()
    nn.init.uniform_(model[0].weight, 0.1, 50)
    data = Recorded(5, 6)
    before = model(data.images)
    smooth(model, data)
    torch.testing.assert_close(model(data.images), before, rtol=1e-5, atol=1e-5)
    top = model[0](data.images).abs().amax(0)
    torch.testing.assert_close(top, input_ranges(model[1], weight_of(model[1])), rtol=1e-4, atol=0)


def test_a_norm_that_a_sum_reads_is_not_smoothed() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return y + self.fc(y)

    data = Recorded(5, 6)
    smooth(Residual().eval(), data)
    assert data.recorded["smooth"]["norms"] == 0


def test_reparameterized_blocks_are_one_convolution_each() -> None:
    data, model = Recorded(1, 3, 32, 32), randomized(tiny_repvgg())
    reparameterize(model, data)
    assert data.recorded["reparameterize"]["blocks"] == 5
    assert len([layer for layer in weight_layers(model) if isinstance(layer, nn.Conv2d)]) == 5
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_the_largest_channels_are_halved_first() -> None:
    assert halvings(torch.tensor([1.0, 8.0, 3.0]), 4) == ([1, 1, 3, 2], 2.0)
    data, layer = Recorded(4, 5), nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight[1, 2] = 10
    model = nn.Sequential(layer).eval()
    with torch.no_grad():
        before = model(data.images)
        split_channels(model, data, ratio=0.2)
        assert layer.weight.shape == (3, 6)
        assert float(layer.weight.abs().max()) == 5
        torch.testing.assert_close(model(data.images), before)
    assert is_split(layer)
    split_channels(model, data)
    assert layer.weight.shape == (3, 6)


def test_halves_that_lie_half_a_step_apart_are_rounded_as_well_as_the_whole() -> None:
    torch.manual_seed(0)
    data, layer = Recorded(4, 16), nn.Linear(16, 64)
    with torch.no_grad():
        layer.weight[:, 3] *= 4
        whole = layer.weight.clone()
        split_channels(nn.Sequential(layer), data, ratio=1 / 16, bits=4)
        torch.testing.assert_close(layer.weight[:, 3] + layer.weight[:, 16], whole[:, 3])
        step = layer.weight.abs().max() / 7
        rtn(nn.Sequential(layer), data, bits=4, granularity="tensor")
        both = layer.weight[:, 3] + layer.weight[:, 16]
    assert float((both - whole[:, 3]).abs().max()) <= 0.5001 * float(step)


@pytest.mark.parametrize("step", [equalize, smooth, reparameterize, split_channels])
def test_quantized_layers_are_refused(step: Any) -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    data = Recorded(2, 6)
    with pytest.raises(UserError, match="is quantized already"):
        step(rtn(model, data), data)
