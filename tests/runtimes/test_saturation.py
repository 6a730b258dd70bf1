"""The probe sees kernels that lose sums, and only these."""

import numpy as np
import pytest
from torch import Tensor, nn

from qbench.runtimes.base import Compiled
from qbench.runtimes.saturation import saturates


class Kernels:
    """Computes in float, then cuts sums off."""

    device = "cpu"

    def __init__(self, largest: float) -> None:
        self.largest = largest

    def compile(self, module: nn.Module, example: Tensor, *, threads: int) -> Compiled:
        def run(batch: np.ndarray) -> list[np.ndarray]:
            return [module(example).detach().numpy().clip(max=self.largest)]

        return Compiled(run, 1, 1, ("0",), {})


@pytest.mark.parametrize(("largest", "expected"), [(np.inf, False), (500.0, True)])
def test_what_is_lost_is_seen(largest: float, expected: bool) -> None:
    assert saturates(Kernels(largest), 1) is expected  # type: ignore[arg-type]
