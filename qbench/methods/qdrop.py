"""QDrop: block reconstruction with quantized activations, some of which are dropped."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.quant.block_unit import Learn, Settings, Start
from qbench.quant.blockwise import reconstruct_blocks
from qbench.registry import EdgeBits, method


@method("qdrop", paper="arXiv:2203.05740")
def qdrop(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 4,
    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = 4,
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.5,
    granularity: Literal["tensor", "channel"] = "channel",
    symmetric: bool = False,
    start: Start = "nearest",
    learn: Learn = "rounding",
    steps: Annotated[int, Field(ge=1)] = 500,
    batch_size: Annotated[int, Field(ge=1)] = 32,
    lr: Annotated[float, Field(gt=0)] = 0.02,
    rounding_weight: Annotated[float, Field(gt=0)] = 0.01,
    images: Annotated[int, Field(ge=1)] | None = None,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Reconstruct blocks with weights and inputs quantized, where each number of an input is quantized by chance only.

    That makes the answers of a block flat about the quantized inputs. Blocks are found from the model's own structure
    (`qbench.quant.blocks`); layers outside of blocks are reconstructed alone. The inputs' steps are learned together
    with the roundings; they start with the least squared error. Inputs that have a static quantizer start from that.

    Args:
        model: changed in place.
        data: its calibration images, and its float network.
        bits: width of the weights' codes.
        activation_bits: width of the inputs' codes, which are unsigned with a zero point; null leaves inputs without a
            quantizer in float, and blocks still see them mixed with the float network's.
        keep: the probability of a number to be quantized while learning; in the end all are.
        granularity: one scale per tensor or per output channel; it minimises sum |w - q|^2.4 and is kept.
        symmetric: weights from -(2**(bits-1) - 1) to 2**(bits-1) - 1 about 0; otherwise 0 to 2**bits - 1, zero point.
        start: `nearest` rounding, or `given`: the codes and grids of a step before, such as gptq, whatever `bits`,
            `granularity` and `symmetric` say.
        learn: `rounding`: up or down, as the authors have it; `codes`: weights move as far as they like, straight
            through the rounding, with their steps and the biases, in the manner of AdaQuant (arXiv:2006.10518). That
            needs far fewer steps.
        steps: of Adam, per block; the authors take 20,000.
        batch_size: images per step; fewer where an image has more than 14 x 14 positions, as many positions in all.
        lr: where codes are learned: of the weights in units of their mean step; a tenth of it for the steps and, in
            units of the outputs, for the biases. It falls to 0 along a cosine.
        rounding_weight: of the penalty that decides the roundings.
        images: use the first so many calibration images; default all.
        edge_bits: bits of weights and inputs of the first and the last layer; 32 leaves them in float. The authors
            take 8.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: a step before changed the shape of a layer, or left one without uniform codes to start from.
    """
    settings = Settings(
        bits=bits,
        activation_bits=activation_bits,
        granularity=granularity,
        symmetric=symmetric,
        start=start,
        learn=learn,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        rounding_weight=rounding_weight,
        keep=keep,
        images=images,
        edge_bits=edge_bits,
        skip=skip,
    )
    return reconstruct_blocks(model, data, settings)
