"""PTQ4ViT: which quantizers go where, and that the search is worth it."""

import pytest
import timm
import torch

from qbench.data import Batches, Data
from qbench.errors import Unsupported, UserError
from qbench.methods.activations import activations
from qbench.methods.ptq4vit import ptq4vit
from qbench.models.base import cross_entropy
from qbench.quant.activations import StaticQuantizer, input_quantizers
from qbench.quant.layers import encodings, named_weight_layers
from qbench.quant.matmuls import operands
from qbench.quant.twin_quantizers import TwinGelu, TwinSoftmax

QUICK = {"candidates": 12, "images": 4, "rounds": 1}


class Noise:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return 4

    def batch(self, positions):
        return torch.stack(
            [torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(p)) for p in positions]
        )


def data(size=32):
    return Data(Batches(Noise(size), torch.device("cpu")), None, cross_entropy)


def vit():
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **options).eval()


def swin():
    torch.manual_seed(0)
    options = {"img_size": 56, "depths": (2,), "embed_dim": 24, "num_heads": (2,), "num_classes": 5}
    return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, **options).eval()


@pytest.mark.parametrize(("build", "size"), [(vit, 32), (swin, 56)])
def test_softmax_and_gelu_have_twin_steps(build, size):
    model, x = build(), Noise(size).batch(range(4))
    before = model(x)
    model = ptq4vit(model, data(size), **QUICK)
    attached = input_quantizers(model)
    assert attached.keys() == named_weight_layers(model).keys() | operands(model).keys()
    assert {n for n, q in attached.items() if isinstance(q, TwinGelu)} == {n for n in attached if n.endswith("mlp.fc2")}
    softmax = {n for n, q in attached.items() if isinstance(q, TwinSoftmax)}
    assert softmax == {n for n in attached if n.endswith("matmul1.left")}
    for encoding in encodings(model).values():
        assert encoding.scale.numel() == 1
        assert (encoding.low, encoding.high) == (-128, 127)
    assert len(encodings(model)) == len(named_weight_layers(model))
    assert (model(x) - before).norm() < 0.1 * before.norm()


def test_options_choose_the_quantizers():
    model = ptq4vit(vit(), data(), bits=4, twin=False, granularity="channel", skip=("blocks.1",), **QUICK)
    attached = input_quantizers(model)
    assert all(isinstance(q, StaticQuantizer) and q.symmetric for q in attached.values())
    assert not [name for name in attached if name.startswith("blocks.1")]
    assert encodings(model)["blocks.0.mlp.fc1.weight"].scale.shape == (96, 1)


def test_searched_scales_are_nearer_than_those_that_reach_to_the_extremes():
    x = Noise(32).batch(range(4))
    answers = vit()(x)

    def error(**options):
        return (ptq4vit(vit(), data(), bits=4, activation_bits=4, images=4, **options)(x) - answers).norm()

    # Both multiples of the only candidates are so near to 1 that nothing is clipped or left unused.
    fixed = {"least": 1.0, "most": 1.0001, "candidates": 2, "rounds": 1}
    assert error(candidates=24) < 0.9 * error(**fixed)


def test_what_is_quantized_already_is_refused():
    with pytest.raises(UserError, match="leave that step out"):
        ptq4vit(activations(vit(), data()), data())
    with pytest.raises(UserError, match="quantized already"):
        ptq4vit(ptq4vit(vit(), data(), **QUICK), data())


def test_a_network_without_attention_is_unsupported():
    with pytest.raises(Unsupported, match="no attention"):
        ptq4vit(timm.create_model("test_resnet", num_classes=5).eval(), data())
