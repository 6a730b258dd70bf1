"""Codebooks whose levels are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.clustering import Start
from qbench.quant.fakequant import Granularity, LearnedInput
from qbench.quant.learned_codebook import LearnedCodebook
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.registry import method


@method("kmeans_finetune", track="qat", paper="arXiv:1510.00149")
def kmeans_finetune(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=1, le=8)] = 4,
    granularity: Granularity = "tensor",
    start: Start = "linear",
    assignments: Literal["fixed", "redone"] = "fixed",
    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = None,
    edge_bits: Annotated[int, Field(ge=1, le=8)] | Literal[32] | None = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(optimizer="adamw", lr=0.001),
) -> nn.Module:
    """Cluster the weights into 2**bits levels (k-means), and train the levels.

    The gradient of a level is the sum of those of its members. Weights that are 0 stay 0 if the layer has any: it was
    pruned, and one of its levels is 0.

    Args:
        model: the float model, pruned or not.
        data: with training images.
        bits: width of the codes.
        granularity: one codebook for each weight tensor, or for each output channel.
        start: of k-means; `linear` is even spacing, as in the paper.
        assignments: `fixed` trains levels only, as the paper; with `redone` the weights learn as well, straight
            through, and each takes the level nearest to it at every step.
        activation_bits: of the inputs of the same layers, with learned steps; None leaves them in float.
        edge_bits: of the first and the last layer; None means like all others, 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.

    Raises:
        Unsupported: distillation is asked for, and there is no float network or its outputs are not logits.
    """

    def codebook(weight: Tensor, width: int, axis: int) -> LearnedCodebook:
        return LearnedCodebook(
            weight, width, axis, granularity=granularity, start=start, seed=data.seed, fixed=assignments == "fixed"
        )

    return train_quantized(
        model,
        data,
        schedule,
        codebook,
        LearnedInput,
        name="kmeans_finetune",
        bits=bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
    )
