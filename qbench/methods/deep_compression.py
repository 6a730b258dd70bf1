"""Deep Compression: prune, share weights, code."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.methods.compress import compress
from qbench.methods.prune import prune
from qbench.quant.coding import Coder
from qbench.quant.fakequant import LearnedInput, weight_quantizer
from qbench.quant.free_weights import free_weight
from qbench.quant.layers import named_weight_layers
from qbench.quant.learned_codebook import LearnedCodebook
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule, Share
from qbench.quant.training import Step
from qbench.registry import method

Width = Annotated[int, Field(ge=1, le=8)]


@method("deep_compression", track="qat", paper="arXiv:1510.00149")
def deep_compression(
    model: nn.Module,
    data: Data,
    *,
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.7,
    bits: Width = 5,
    edge_bits: Width | None = 8,
    retraining: Share = 0.5,
    coder: Coder = "huffman",
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(optimizer="adamw", lr=0.001),
) -> nn.Module:
    """Prune the smallest weights and train the others, cluster them and train the levels, and store Huffman codes.

    The steps are those of `prune`, `kmeans_finetune` and `compress`, in one training. The paper prunes in several
    rounds, by thresholds chosen for each layer.

    Args:
        model: the float model.
        data: with training images.
        sparsity: share of the weights of each layer that are set to zero.
        bits: of the index of a level; one of the 2**bits levels of a layer is 0.
        edge_bits: of the first and the last layer; None means like all others.
        retraining: share of the training before weights are clustered.
        coder: of the codes, zeros among them: `huffman`, or one that lists what is not zero (see `compress`).
        skip: names, or first parts of names, of layers left as they are.
        schedule: of the training.

    Raises:
        UserError: a layer is quantized already.
        Unsupported: distillation is asked for, and there is no float network or its outputs are not logits.
    """
    prune(model, data, sparsity=sparsity, skip=skip)

    def codebook(weight: Tensor, width: int, axis: int) -> LearnedCodebook:
        return LearnedCodebook(weight, width, axis, seed=data.seed, waits=True)

    def cluster(step: Step) -> None:
        if step.done >= retraining:
            _cluster(step.model)

    train_quantized(
        model,
        data,
        schedule,
        codebook,
        LearnedInput,
        name="deep_compression",
        bits=bits,
        activation_bits=None,
        edge_bits=edge_bits,
        skip=skip,
        on_step=cluster,
    )
    return compress(model, data, coder=coder)


def _cluster(model: nn.Module) -> None:
    """Let all codebooks begin that wait."""
    for layer in named_weight_layers(model).values():
        quantizer = weight_quantizer(layer)
        if isinstance(quantizer, LearnedCodebook) and quantizer.waiting:
            quantizer.cluster(free_weight(layer))
