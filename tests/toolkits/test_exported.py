"""Graphs of torch.export, quantized by hand in the forms in which toolkits do it."""

import pytest
import torch
from torch import nn

from qbench.errors import Unsupported
from qbench.quant.layers import encodings
from qbench.toolkits.adopt import adopt
from qbench.toolkits.exported import export, read
from qbench.toolkits.places import Grid


def quantize_per_tensor(x, scale, zero, low, high, dtype):
    return (x / scale).round().add(zero).clamp(low, high).to(dtype)


def dequantize_per_tensor(codes, scale, zero, low, high, dtype):
    return (codes.float() - zero) * scale


def quantize_per_channel(x, scale, zero, axis, low, high, dtype):
    return x


def dequantize_per_channel(codes, scale, zero, axis, low, high, dtype):
    return (codes.float() - zero.view(-1, 1)) * scale.view(-1, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.first(x).relu().reshape(-1, 3))


CODES = torch.tensor([[1, -2, 3], [-128, 127, 0]], dtype=torch.int8)
SCALE = torch.tensor([0.5, 0.25])


def node(graph, name):
    return next(n for n in graph.graph.nodes if n.name == name)


def constant(graph, name, value):
    graph.register_buffer(name, value)
    return graph.graph.get_attr(name)


def per_channel(graph):
    codes, scale, zero = (constant(graph, n, v) for n, v in (("c", CODES), ("s", SCALE), ("z", torch.zeros(2).int())))
    return graph.graph.call_function(dequantize_per_channel, (codes, scale, zero, 0, -128, 127, torch.int8))


def product(graph):
    codes, scale, shift = (
        constant(graph, n, v) for n, v in (("c", CODES), ("s", SCALE[:, None]), ("z", torch.zeros(2, 1)))
    )
    scaled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (codes, scale))
    return graph.graph.call_function(torch.ops.aten.sub.Tensor, (scaled, shift))


def quantized(weight, bias=None):
    """The last layer has codes, and its input a quantizer in front of the ReLU."""
    model = Net().eval().requires_grad_(False)
    exported = export(model, torch.randn(1, 4))
    changed = export(model, torch.randn(1, 4))
    layers = [n for n in changed.graph.nodes if "linear" in str(n.target)]
    with changed.graph.inserting_before(layers[1]):
        layers[1].args = (layers[1].args[0], weight(changed), layers[1].args[2])
        if bias is not None:
            layers[1].args = (*layers[1].args[:2], constant(changed, "b", bias))
    with changed.graph.inserting_after(layers[0]):
        codes = changed.graph.call_function(quantize_per_tensor, (layers[0], 0.125, 7, 0, 255, torch.uint8))
    with changed.graph.inserting_after(codes):
        values = changed.graph.call_function(dequantize_per_tensor, (codes, 0.125, 7, 0, 255, torch.uint8))
    layers[0].replace_all_uses_with(values, delete_user_cb=lambda user: user is not codes)
    changed.recompile()
    return model, read(changed, exported, "it"), changed


@pytest.mark.parametrize("weight", [per_channel, product])
def test_codes_biases_and_quantizers_are_read_and_put_on_the_network(weight):
    model, graph, changed = quantized(weight, bias=torch.tensor([3.0, -1.0]))
    assert graph.quantizers(model) == {"last": Grid((0.125,), (7,), 0, 255)}
    adopt(model, graph)
    code = encodings(model)["last.weight"]
    assert torch.equal(code.codes, CODES.int())
    assert (code.low, code.high) == (-128, 127)
    assert torch.equal(model.last.weight, CODES * SCALE[:, None])
    assert model.last.bias.tolist() == [3.0, -1.0]
    assert list(encodings(model)) == ["last.weight"]
    x = torch.randn(1, 4)
    assert torch.allclose(model(x), changed(x), atol=1e-6)


def test_a_weight_that_is_decoded_in_another_way_is_refused():
    def halved(graph):
        return graph.graph.call_function(torch.ops.aten.div.Tensor, (constant(graph, "c", CODES), 2))

    with pytest.raises(Unsupported, match="it decodes a weight by div"):
        quantized(halved)


def test_what_cannot_be_exported_says_why():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(Unsupported, match=r"^torch cannot export the network: "):
        export(Branches(), torch.randn(1, 4))
