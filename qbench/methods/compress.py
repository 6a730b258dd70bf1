"""Lossless coding of what is quantized."""

from torch import nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.coding import Coder
from qbench.quant.encodings import Affine, Codebook, VectorCodebook, coded, leaves
from qbench.quant.layers import encode, encodings
from qbench.registry import method


@method("compress", track="structure", paper="arXiv:2108.12704")
def compress(model: nn.Module, data: Data, *, coder: Coder = "rans") -> nn.Module:
    """Store the codes of quantized weights entropy-coded in the artifact; no weight changes.

    A step for the end of a recipe: what is quantized later is not coded. Each layer has an alphabet and code lengths
    or frequencies of its own, stored with it; where its codes are smaller at their true bit width, they stay so.

    Args:
        model: quantized; changed in place.
        data: not used.
        coder: `rans` reaches the entropy nearly; `huffman` is canonical, with words of at most 16 bits; `hac` is
            Huffman by columns in 32-bit words, and `shac` its sparse form; `csr` lists the weights that are not zero,
            at their true bit width, with run lengths of 5 bits (matrices) or 8 bits (convolutions).

    Raises:
        Unsupported: no weight has codes.
    """
    attached = encodings(model)
    with_codes = (Affine, Codebook, VectorCodebook)
    chosen = [name for name, e in attached.items() if any(isinstance(leaf, with_codes) for leaf in leaves(e))]
    if not chosen:
        raise Unsupported("no weight has codes to compress: quantize in a step before this one")
    for name in chosen:
        layer, _, parameter = name.rpartition(".")
        encode(model.get_submodule(layer), coded(attached[name], coder), parameter)
    data.record("compress", {"coder": coder, "tensors": len(chosen)})
    return model
