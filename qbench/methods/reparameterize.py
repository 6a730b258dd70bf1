"""Blocks of several branches merged into one convolution."""

from torch import nn

from qbench.data import Data
from qbench.quant import structure
from qbench.quant.channels import refuse_quantized
from qbench.quant.merging import mergeable
from qbench.registry import method


@method("reparameterize", track="structure", paper="arXiv:2101.03697")
def reparameterize(model: nn.Module, data: Data) -> nn.Module:
    """Merge the branches of RepVGG-like blocks into one convolution each; the float function stays.

    Blocks are those with a method `fuse`, `reparameterize` or `switch_to_deploy`, as timm's have. A model without any
    is returned as it is.

    Args:
        model: changed in place.
        data: told how many blocks it was.

    Raises:
        UserError: a layer is quantized already.
    """
    model.eval()
    refuse_quantized(dict(model.named_modules()), "reparameterize")
    merged = 0
    for name in mergeable(model):
        # A block that holds others may have merged, and dropped, them itself.
        if name in dict(model.named_modules()):
            structure.apply(model, "reparameterize", module=name)
            merged += 1
    data.record("reparameterize", {"blocks": merged})
    return model
