"""What errors of a layer's answers cost: against the Hessian itself."""

import pytest
import torch
from torch import nn

from qbench.errors import Unsupported
from qbench.quant.evidence import gather, probes


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).eval()


def test_what_is_gathered(model):
    x = torch.randn(6, 3)
    evidence = gather(model, "2", x.split(4), probes(model, x.split(4), 0))
    assert torch.equal(evidence.inputs[0], model[1](model[0](x)))
    assert torch.equal(evidence.outputs, model(x))
    assert evidence.importance.shape == (6, 3)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["0", "2"])
def test_the_importance_is_the_hessians_diagonal_in_the_mean(model, name):
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    many = x.expand(20_000, 3)
    found = gather(model, name, [many], probes(model, [many], 0)).importance.mean(0)
    start = model[: int(name) + 1](x).detach()
    rest = nn.Sequential(*[nn.ReLU() if isinstance(m, nn.ReLU) else m for m in model[int(name) + 1 :]])
    chances = rest(start).softmax(1).detach()

    def divergence(y):
        return (chances * (chances.log() - rest(y[None]).log_softmax(1))).sum()

    hessian = torch.autograd.functional.hessian(divergence, start[0])
    assert torch.autograd.functional.jacobian(divergence, start[0]).abs().max() < 1e-6
    assert torch.allclose(found, hessian.diagonal(), rtol=0.05, atol=1e-4)


def test_modules_that_cannot_be_looked_at_are_said(model):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.layer(x))

    x = torch.randn(2, 3)
    twice = Twice().eval()
    with pytest.raises(Unsupported, match="layer is called more than once"):
        gather(twice, "layer", [x], probes(twice, [x], 0))
    with pytest.raises(Unsupported, match="no logits"):
        probes(nn.Unflatten(1, (3, 1)), [x], 0)
