"""Bit widths of a detector's heads."""

from typing import Literal

from torch import nn

from qbench.data import Data
from qbench.errors import Unsupported, UserError
from qbench.quant.heads import heads_of, set_head_bits
from qbench.registry import method

HeadBits = Literal[4, 6, 8, 32] | None


@method("head_bits", track="structure")
def head_bits(model: nn.Module, data: Data, *, boxes: HeadBits = 8, scores: HeadBits = None) -> nn.Module:
    """Set the bit widths of a detector's heads for all steps that follow, of weights and of inputs alike.

    Boxes need finer steps than scores: an error of a coordinate moves the box, one of a score often changes no rank.
    The widths stand in place of a step's `bits` and `edge_bits`; its `layer_bits` and `skip` go first.

    Args:
        model: a detector.
        data: not used.
        boxes: bits of the layers that place boxes; 32 leaves them in float, None changes nothing.
        scores: bits of the layers that score classes; 32 leaves them in float, None changes nothing.

    Raises:
        Unsupported: the network does not say which layers are its heads.
        UserError: there is nothing to set.
    """
    heads = heads_of(model)
    if heads is None:
        raise Unsupported("the network has no heads that place boxes and score classes: head_bits is for detectors")
    if boxes is None and scores is None:
        raise UserError("head_bits sets neither boxes nor scores; leave it out of the recipe")
    widths = ((heads.boxes, boxes), (heads.scores, scores))
    set_head_bits(model, {name: bits for names, bits in widths if bits is not None for name in names})
    return model
