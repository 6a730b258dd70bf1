"""Quantized operands of products, as the method `activations` attaches them."""

import pytest
import torch

from qbench.data import Batches, Data
from qbench.errors import UserError
from qbench.methods.activations import activations
from qbench.models.base import cross_entropy
from qbench.quant.activations import DynamicQuantizer, StaticQuantizer, input_quantizers
from qbench.quant.log_quantizer import LogQuantizer
from qbench.quant.matmuls import operands
from qbench.registry import resolve
from qbench.worker import bits


class Noise:
    def __len__(self):
        return 8

    def batch(self, positions):
        return torch.stack([torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(p)) for p in positions])


DATA = Data(Batches(Noise(), torch.device("cpu")), None, cross_entropy)


@pytest.fixture
def vit():
    return resolve("model", "digits_vit")().load()


def test_operands_are_quantized_like_inputs(vit):
    plain = input_quantizers(activations(resolve("model", "digits_vit")().load(), DATA, bits=4))
    model = activations(vit, DATA, bits=4, edge_bits=8, matmuls=True, skip=("blocks.1",))
    attached = input_quantizers(model)
    assert attached.keys() - plain.keys() == set(operands(model, ("blocks.1",)))
    assert all(isinstance(q, StaticQuantizer) for q in attached.values())
    assert {q.bits for name, q in attached.items() if name in operands(model)} == {4}
    softmax = attached["blocks.0.attn.matmul1.left"]
    assert int(softmax.zero_point) == 0
    assert float(softmax.scale) * 15 <= 1


@pytest.mark.parametrize(("softmax", "per_octave"), [("log2", 1), ("log_sqrt2", 2)])
def test_logarithmic_softmax(vit, softmax, per_octave):
    attached = input_quantizers(activations(vit, DATA, bits=4, matmuls=True, softmax=softmax))
    logs = {name for name, q in attached.items() if isinstance(q, LogQuantizer)}
    assert logs == {f"blocks.{i}.attn.matmul1.left" for i in range(6)}
    assert {attached[name].per_octave for name in logs} == {per_octave}
    assert all(0 < attached[name].scale <= 1 for name in logs)


def test_bits_are_those_of_all_levels(vit):
    model = activations(vit, DATA, bits=4, matmuls=True, softmax="log2")
    assert bits(model)["activations"] == pytest.approx((44 * 4 + 6 * torch.tensor(17.0).log2().item()) / 50)


def test_dynamic_operands_have_a_range_for_each_image(vit):
    model = activations(vit, DATA, mode="dynamic", granularity="token", matmuls=True)
    for name, quantizer in input_quantizers(model).items():
        assert isinstance(quantizer, DynamicQuantizer)
        if name in operands(model):
            assert quantizer.granularity == "tensor"


@pytest.mark.parametrize("options", [{}, {"matmuls": True, "mode": "dynamic"}])
def test_a_logarithmic_softmax_needs_static_operands(vit, options):
    with pytest.raises(UserError, match="matmuls=true and mode=static"):
        activations(vit, DATA, softmax="log2", **options)
