"""Which layers read the output of a function as it is."""

import torch
from torch import nn
from torch.nn import functional as F

from qbench.quant.origins import origins


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)
        for name in ("straight", "scaled", "in_place", "other", "viewed"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x):
        y = self.straight(self.drop(F.gelu(x)))
        y = self.scaled(2 * F.gelu(y))
        y = self.in_place(F.gelu(y).add_(1))
        y = self.other(y.softmax(-1))
        return self.viewed(F.gelu(y).reshape(2, 2, 4))


def test_only_what_is_read_unchanged_is_found():
    model, x = Net().eval(), torch.randn(4, 4)
    found = origins(model, x, ["gelu"], dict(model.named_children()))
    assert found == {"drop": "gelu", "straight": "gelu", "viewed": "gelu"}
    assert origins(model, x, ["gelu", "_softmax"], ["other", "scaled"]) == {"other": "_softmax"}
