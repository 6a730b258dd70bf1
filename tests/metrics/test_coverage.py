"""Size, coverage, the levels audit and cost of networks whose numbers are known."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qbench.errors import Unsupported
from qbench.metrics.cost import cost
from qbench.metrics.coverage import coverage, macs
from qbench.metrics.size import size
from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.audit import audit, distinct
from qbench.quant.encodings import Affine, Cast, Codebook, Rotated, Sum, VectorCodebook
from qbench.quant.layers import encode
from qbench.quant.matmuls import expose
from qbench.quant.packing import Sizes


class Attention(nn.Module):
    """Two linear layers around a product of activations."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.spare = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):  # (B, 8, 4)
        x = self.first(x)
        x = x @ x.transpose(1, 2) @ x
        return torch.nn.functional.linear(self.second(x), self.spare.weight)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Attention().eval()


def finished(model, **fields):
    return SimpleNamespace(quantized=model, data=SimpleNamespace(example=torch.randn(1, 8, 4)), **fields)


def test_macs(net):
    total, by_layer = macs(net, torch.randn(1, 8, 4))
    assert by_layer == {"first": 8 * 16, "second": 8 * 16}
    assert total == 3 * 8 * 16 + 2 * 8 * 8 * 4  # the spare layer's weight is used, but not through the layer


def test_macs_of_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(6, 2, 1, stride=2))
    total, by_layer = macs(model, torch.randn(1, 3, 8, 8))
    assert by_layer == {"0": 64 * 6 * 9, "1": 16 * 2 * 6}
    assert total == sum(by_layer.values())


def test_coverage(net):
    assert coverage(finished(net))["macs_weights"] == 0
    encode(net.first, Affine.nearest(net.first.weight, 0.1, bits=4))
    encode(net.second, Affine.nearest(net.second.weight, 0.1, bits=4))
    quantize_input(net.second, StaticQuantizer(8, True, 0.1))
    values = coverage(finished(net))
    assert values["weights_total"] == 56
    assert values["weights_quantized"] == 32
    assert values["value"] == pytest.approx(100 * 32 / 56)
    assert (values["macs_weights"], values["macs_both"]) == (256, 128)
    assert values["macs_total"] == 384 + 512
    assert set(values["levels"]) == {"first.weight", "second.weight"}


def test_a_tied_weight_counts_once(net):
    net.second.weight = net.first.weight
    for layer in (net.first, net.second):
        encode(layer, Affine.nearest(layer.weight, 0.1, bits=4))
    values = coverage(finished(net))
    assert (values["weights_quantized"], values["weights_total"]) == (16, 40)
    assert values["macs_weights"] == 256


def test_size(net, tmp_path):
    encode(net.first, Affine.nearest(net.first.weight, torch.full((4,), 0.1), bits=4))
    sizes = Sizes(nominal_bits=800, packed_bytes=200, file_bytes=2**20, weights=56)
    artifact = tmp_path / "artifact"
    artifact.write_bytes(bytes(1000))
    values = size(finished(net, sizes=sizes, float_bytes=999, artifact=artifact))
    assert values["value"] == 1
    assert values["covered_weights"] == 16
    assert values["covered_bytes"] == 8 + 4 * 4  # codes, and a float32 scale for each channel
    assert values["covered_float_bytes"] == 64
    assert values["nominal_bytes"] == 100
    assert values["float_bytes"] == 999


def test_cost():
    known = {"seconds": 2.5, "peak_memory_bytes": 7, "images": 32}
    assert cost(SimpleNamespace(cost=known)) == {"value": 2.5, **known}
    with pytest.raises(Unsupported):
        cost(SimpleNamespace(cost={}))


def claims(weight, code):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    encode(layer, code)
    return {name.removeprefix("weight"): (entry["levels"], entry["used"]) for name, entry in audit(layer).items()}


def test_levels_are_counted_where_a_scale_applies():
    weight = torch.arange(-12.0, 12.0).reshape(2, 12)
    assert claims(weight, Affine.nearest(weight, 1.0, bits=8)) == {"": (255, 24)}
    assert claims(weight, Affine.nearest(weight, torch.ones(2), bits=8)) == {"": (255, 12)}
    assert claims(weight, Affine.nearest(weight, torch.ones(2, 3), bits=8, group_size=5)) == {"": (255, 5)}
    assert claims(weight, Affine.nearest(weight, torch.ones(2), bits=2)) == {"": (3, 2)}
    levels = torch.tensor([-5.0, 0.0, 5.0])
    assert claims(weight, Codebook.nearest(weight, levels)) == {"": (3, 3)}
    assert claims(weight, Codebook.nearest(weight, levels, scale=torch.tensor([1.0, 2.0]))) == {"": (3, 2)}
    assert claims(weight, Codebook.nearest(weight, levels.expand(2, 3))) == {"": (3, 2)}
    assert claims(weight, Cast(weight.half())) == {"": (65536, 24)}


def test_levels_of_composed_encodings():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    first = Affine.nearest(weight, 0.5, bits=3)
    second = Affine.nearest(weight - first.decode(), 0.1, bits=2)
    found = claims(weight, Sum((first, second)))
    assert set(found) == {"[0]", "[1]"}
    assert all(used <= levels for levels, used in found.values())
    assert claims(weight, Rotated(second, torch.linalg.qr(weight.T @ weight).Q))[""][0] == 3
    vectors = VectorCodebook(torch.tensor([[0, 1, 1], [0, 0, 1], [2, 0, 0], [0, 0, 0]]), torch.randn(5, 2), (4, 6))
    assert claims(weight, vectors) == {"": (5, 3)}


def test_a_false_claim_shows():
    weight = torch.arange(10.0)[None]
    code = Affine.nearest(weight, 1.0, bits=8)
    assert claims(weight, Affine(code.codes, code.scale, 0, 3)) == {"": (4, 10)}


def test_distinct():
    assert distinct(torch.tensor([[1.0, 1.0, 2.0], [0.0, -0.0, 0.0]])) == 2
    assert distinct(torch.zeros(0, 3)) == 0


def test_coverage_of_products_of_activations(net):
    expose(net, torch.randn(1, 8, 4))
    total, by_layer = macs(net, torch.randn(1, 8, 4))
    assert total == 3 * 8 * 16 + 2 * 8 * 8 * 4
    assert by_layer["matmul0"] == by_layer["matmul1"] == 8 * 8 * 4
    quantize_input(net.matmul0.left, StaticQuantizer(8, True, 0.1))
    assert coverage(finished(net))["macs_both"] == 0
    quantize_input(net.matmul0.right, StaticQuantizer(8, True, 0.1))
    counted = coverage(finished(net))
    assert (counted["macs_both"], counted["macs_weights"], counted["macs_total"]) == (8 * 8 * 4, 0, total)


def test_fused_attention_is_counted():
    class Fused(nn.Module):
        def forward(self, x):  # (B, heads, tokens, channels)
            return nn.functional.scaled_dot_product_attention(x, x, x)

    total, _ = macs(Fused(), torch.randn(2, 3, 8, 4))
    assert total == 2 * (2 * 3 * 8 * 8 * 4)
