"""Exposed products of activations: the function stays, operands can be quantized, and artifacts are rebuilt."""

import copy

import pytest
import timm
import torch
from torch import nn

from qbench.errors import Unsupported
from qbench.quant import packing, structure
from qbench.quant.activations import StaticQuantizer, input_quantizers, quantize_input
from qbench.quant.matmuls import expose, operands, products
from qbench.registry import resolve

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2}
ATTENTIONS = {
    "vit_tiny_patch16_224": (32, {"img_size": 32, **SMALL}),
    "deit3_small_patch16_224": (32, {"img_size": 32, **SMALL}),
    "beit_base_patch16_224": (32, {"img_size": 32, **SMALL}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28, "depth": 1}),
    # Windows that are shifted have a mask, others have none.
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "depths": (2,), "embed_dim": 24, "num_heads": (2,)}),
}


def network(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=5, **options).eval().requires_grad_(False)


def images(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_function_stays(name):
    size, options = ATTENTIONS[name]
    model, x = network(name, **options), images(size)
    fresh, names, answers = copy.deepcopy(model), list(model.state_dict()), model(x)
    expose(model, x[:1])
    assert len(products(model)) == 2 * sum("attn" in n and n.endswith("matmul0") for n, _ in model.named_modules())
    assert len(operands(model)) == 2 * len(products(model)) > 0
    assert (model(x) - answers).abs().max() <= 1e-5 * answers.abs().max()
    assert list(model.state_dict()) == names

    structure.replay(fresh, structure.record(model))
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_exposing_again_changes_nothing():
    model = network("vit_tiny_patch16_224", img_size=32, **SMALL)
    expose(model, images(32, 1))
    before = structure.record(model)
    expose(model, images(32, 1))
    assert structure.record(model) == before
    assert len(before) == 2


def test_operands_are_what_is_multiplied():
    model = network("vit_tiny_patch16_224", img_size=32, **SMALL)
    expose(model, images(32, 1))
    seen = {}
    for name, operand in operands(model).items():
        operand.register_forward_hook(lambda _m, inputs, _o, name=name: seen.__setitem__(name, inputs[0]))
    model(images(32))
    softmax = seen["blocks.0.attn.matmul1.left"]
    assert softmax.shape == (2, 2, 5, 5)
    assert torch.allclose(softmax.sum(-1), torch.ones(2, 2, 5), atol=1e-6)
    scores = seen["blocks.0.attn.matmul0.left"] @ seen["blocks.0.attn.matmul0.right"]
    assert torch.allclose(scores.softmax(-1), softmax, atol=1e-6)
    assert list(operands(model, ("blocks.0", "blocks.1.attn.matmul0"))) == [
        "blocks.1.attn.matmul1.left",
        "blocks.1.attn.matmul1.right",
    ]


def test_quantized_operands_are_loaded_back(tmp_path):
    plugin = resolve("model", "digits_vit")
    model = plugin().load()
    x = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model(x)
    expose(model, x[:1])
    for number, operand in enumerate(operands(model).values()):
        quantize_input(operand, StaticQuantizer(4, True, 0.1 + 0.01 * number))
    packing.pack(model, tmp_path / "a", packing.Origin("digits_vit", {}))
    loaded = packing.load(tmp_path / "a")
    assert torch.equal(loaded(x), model(x))
    assert not torch.allclose(model(x), before, atol=0.1)
    assert list(input_quantizers(loaded)) == list(operands(loaded))
    assert len(operands(loaded)) == 24


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Twice(nn.Module):
    """One attention, called with different scalars."""

    class Product(nn.Module):
        def forward(self, x, scale: float):
            return x @ x.transpose(1, 2) * scale

    def __init__(self):
        super().__init__()
        self.product = Twice.Product()

    def forward(self, x):
        return self.product(x, 1.0) + self.product(x, 2.0)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(8, 8), "multiplies no activations"),
        (MultiHead(), r"the attention attention \(MultiheadAttention\)"),
        (Twice(), "called several times"),
    ],
)
def test_what_cannot_be_exposed_is_said(model, reason):
    with pytest.raises(Unsupported, match=reason):
        expose(model.eval(), torch.randn(1, 5, 8))
