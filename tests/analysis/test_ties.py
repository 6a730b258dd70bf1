"""Layers that read the same tensor, however they are called."""

import torch
from torch import Tensor, nn

from qbench.analysis.ties import readers


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.query(x) * self.key(input=x))


def test_readers_called_by_place_and_by_keyword():
    assert readers(Projections(), ["query", "key", "out"], torch.randn(2, 4)) == [["query", "key"]]
