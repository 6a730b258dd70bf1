"""The float reference."""

from torch import nn

from qbench.data import Data
from qbench.registry import method


@method("fp32")
def fp32(model: nn.Module, data: Data) -> nn.Module:
    """Leave the model in float: the reference that every other method is compared with."""
    return model
