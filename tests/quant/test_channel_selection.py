"""More or fewer channels between a norm and its readers."""

import copy

import pytest
import torch
from torch import nn

from qbench.quant import structure
from qbench.quant.channel_selection import Channels, add_constants, constants, select, selectable

X = torch.randn(3, 3, 9, 9)


def network(padding: int = 0) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=padding), nn.BatchNorm2d(6), nn.ReLU6(), nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 2, padding=padding, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    for norm in (model[1], model[5]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
    return model.eval()


def test_channels_that_only_layers_read_are_found() -> None:
    assert selectable(network(), X[:1]) == [Channels("0", "1", ("4",)), Channels("4", "5", ("9",))]
    grouped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)).eval()
    assert not selectable(grouped, X[:1])


def test_copies_of_channels_leave_the_function() -> None:
    model = network(padding=1)
    expected = model(X)
    for channels in selectable(model, X[:1]):
        select(model, channels, list(range(len(model.get_submodule(channels.norm).weight))) * 3)
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    assert [tuple(model[i].weight.shape) for i in (0, 4, 9)] == [(18, 3, 3, 3), (24, 18, 2, 2), (4, 24)]
    assert (model[4].in_channels, model[4].out_channels, model[1].num_features) == (18, 24, 18)


@pytest.mark.parametrize("padding", [0, 1])
def test_channels_whose_gate_is_zero_go_without_a_trace(padding: int) -> None:
    """What their norms' biases add is in the next norm, or in a bias; where it is padded, only if ReLU cuts it off."""
    model = network(padding)
    with torch.no_grad():
        for norm, gone in ((model[1], [0, 4]), (model[5], [7])):
            norm.weight[gone] = 0
            if padding:
                norm.bias[gone] = -1.0
    expected = model(X)
    first, second = selectable(model, X[:1])
    kept = {first: [1, 2, 3, 5], second: list(range(7))}
    add_constants(model, constants(model, kept, X[:1]), X[:1])
    for channels, index in kept.items():
        select(model, channels, index)
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    assert [tuple(model[i].weight.shape) for i in (0, 4, 9)] == [(4, 3, 3, 3), (7, 4, 2, 2), (4, 7)]


def test_the_network_is_rebuilt_from_the_record() -> None:
    model = network()
    first, second = selectable(model, X[:1])
    select(model, first, [5, 0, 0])
    select(model, second, [1, 2])
    again = network()
    structure.replay(again, structure.record(model))
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(other(X), model(X))
