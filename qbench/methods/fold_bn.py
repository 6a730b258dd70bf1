"""Batch-norm folding."""

from typing import Any

from torch import nn

from qbench.data import Data
from qbench.quant import structure
from qbench.quant.adjacency import foldable
from qbench.quant.norm_statistics import affine, remember
from qbench.registry import method


@method("fold_bn", track="structure")
def fold_bn(model: nn.Module, data: Data) -> nn.Module:
    """Fold each batch norm into the convolution or linear layer in front of it; the float function stays.

    Pairs are found by watching one calibration image pass through the network: a norm is folded where it is all that
    reads a layer's output. The others stay. A model without batch norms is returned as it is.

    Args:
        model: changed in place.
        data: its first calibration image.

    Raises:
        UserError: a layer is quantized already.
    """
    model.eval()
    pairs = foldable(model, data.example)
    for layer, norm in pairs:
        gone: Any = model.get_submodule(norm)
        written = affine(gone.weight, gone.bias, len(gone.running_mean))
        structure.apply(model, "fold_bn", layer=layer, norm=norm)
        remember(model.get_submodule(layer), written)
    data.record("fold_bn", {"folded": len(pairs)})
    return model
