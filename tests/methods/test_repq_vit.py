"""RepQ-ViT: the reparameterization keeps the function, and one grid then fits all channels."""

import copy

import pytest
import timm
import torch
from torch import nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported, UserError
from qbench.methods.repq_vit import repq_vit
from qbench.models.base import cross_entropy
from qbench.quant.activations import StaticQuantizer, input_quantizers
from qbench.quant.layers import encodings, named_weight_layers
from qbench.quant.log_quantizer import LogQuantizer
from qbench.quant.matmuls import operands
from qbench.quant.percentile_search import percentile_grids
from qbench.quant.post_norm import Alignment, post_norm_layers

SWIN = {"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}
VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
NETWORKS = {"vit_tiny_patch16_224": (32, VIT, 5), "swin_tiny_patch4_window7_224": (56, SWIN, 10)}


class Noise:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return 4

    def batch(self, positions):
        return torch.stack(
            [torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(p)) for p in positions]
        )


def data(size):
    return Data(Batches(Noise(size), torch.device("cpu")), None, cross_entropy)


def network(name):
    """Random weights, with layer norms whose channels differ widely."""
    torch.manual_seed(0)
    size, options, _ = NETWORKS[name]
    model = timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.1, 5)
            nn.init.normal_(module.bias, 0, 2)
    return model.requires_grad_(False), size


@pytest.mark.parametrize("name", NETWORKS)
def test_reparameterization_keeps_the_float_function(name):
    model, size = network(name)
    x = Noise(size).batch(range(4))
    before = model(x)
    found = post_norm_layers(model, x[:1])
    assert len(found) == NETWORKS[name][2]
    for norm, readers in found.items():
        seen = []
        handle = model.get_submodule(norm).register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        model(x)
        handle.remove()
        alignment = Alignment.of(*percentile_grids(seen[0].flatten(0, -2).T, 4, around_zero=False), 4)
        alignment.fold_into_norm(model.get_submodule(norm))
        for reader in readers:
            alignment.fold_into_reader(model, reader)
    assert (model(x) - before).abs().max() <= 1e-4 * before.abs().max()


@pytest.mark.parametrize("bits", [3, 8])
def test_the_common_grid_does_what_each_channels_own_does(bits):
    x = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 7) + torch.arange(7)
    scale, zero = percentile_grids(x.T, bits, around_zero=False)
    own = (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale
    alignment = Alignment.of(scale, zero, bits)
    common = StaticQuantizer(bits, False, alignment.scale, alignment.zero)
    back = (common(alignment.apply(x)) + alignment.shift) * alignment.ratio
    apart = (back - own).abs() / scale
    assert (apart > 1e-2).double().mean() < 2e-3  # only numbers that are half-way between two codes
    assert apart.max() < 1.01


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_is_quantized(name):
    model, size = network(name)
    before = copy.deepcopy(model)
    records = {}
    given = data(size)
    given.record = records.__setitem__
    model = repq_vit(model, given, bits=8, activation_bits=8, images=4)
    layers = named_weight_layers(model)
    assert len(encodings(model)) == len(layers)
    attached = input_quantizers(model)
    assert attached.keys() == layers.keys() | operands(model).keys()
    assert all(isinstance(q, (StaticQuantizer, LogQuantizer)) for q in attached.values())
    assert sorted(records["repq_vit"]["aligned"]) == sorted(post_norm_layers(before, given.example))
    softmax = [name for name, q in attached.items() if isinstance(q, LogQuantizer)]
    assert softmax == [name for name in operands(model) if name.endswith("matmul1.left")]
    x = Noise(size).batch(range(4))
    assert (model(x) - before(x)).norm() < 0.15 * before(x).norm()


def test_layers_in_float_keep_their_norm_as_it_is():
    model, size = network("vit_tiny_patch16_224")
    norm = model.blocks[0].norm1.weight.clone()
    repq_vit(model, data(size), images=4, skip=("blocks.0.attn",))
    assert torch.equal(model.blocks[0].norm1.weight, norm)
    assert not [name for name in input_quantizers(model) if name.startswith("blocks.0.attn")]
    assert "blocks.0.mlp.fc1" in input_quantizers(model)


def test_a_network_without_attention_is_unsupported():
    with pytest.raises(Unsupported, match="no attention"):
        repq_vit(timm.create_model("test_resnet", num_classes=5).eval(), data(32), images=4)


def test_quantized_layers_are_refused():
    model, size = network("vit_tiny_patch16_224")
    model = repq_vit(model, data(size), images=4)
    with pytest.raises(UserError, match="quantized already"):
        repq_vit(model, data(size), images=4)
