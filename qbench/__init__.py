"""qbench: the benchmark harness for neural-network quantization. What is measured is what ships."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qbench.errors import Unsupported, UserError
from qbench.registry import dataset, method, metric, model, runtime

if TYPE_CHECKING:
    from qbench.datasets.base import Boxes, Dataset, Split
    from qbench.models.base import Model, Preprocess
    from qbench.quant.activations import DynamicQuantizer, StaticQuantizer, quantize_input
    from qbench.quant.encodings import Affine, Cast, Codebook, Rotated, Scaled, Sum, VectorCodebook
    from qbench.quant.layers import encode, named_weight_layers, weight_layers
    from qbench.quant.packing import load
    from qbench.quant.sweep import sweep

# Importing torch takes seconds, and `qbench list` begins here: these names are imported at first use.
_LAZY = {
    "Boxes": "qbench.datasets.base",
    "Dataset": "qbench.datasets.base",
    "Split": "qbench.datasets.base",
    "Model": "qbench.models.base",
    "Preprocess": "qbench.models.base",
    "DynamicQuantizer": "qbench.quant.activations",
    "StaticQuantizer": "qbench.quant.activations",
    "quantize_input": "qbench.quant.activations",
    "Affine": "qbench.quant.encodings",
    "Cast": "qbench.quant.encodings",
    "Codebook": "qbench.quant.encodings",
    "Rotated": "qbench.quant.encodings",
    "Scaled": "qbench.quant.encodings",
    "Sum": "qbench.quant.encodings",
    "VectorCodebook": "qbench.quant.encodings",
    "encode": "qbench.quant.layers",
    "named_weight_layers": "qbench.quant.layers",
    "weight_layers": "qbench.quant.layers",
    "load": "qbench.quant.packing",
    "sweep": "qbench.quant.sweep",
}

__all__ = [
    "Affine",
    "Boxes",
    "Cast",
    "Codebook",
    "Dataset",
    "DynamicQuantizer",
    "Model",
    "Preprocess",
    "Rotated",
    "Scaled",
    "Split",
    "StaticQuantizer",
    "Sum",
    "Unsupported",
    "UserError",
    "VectorCodebook",
    "dataset",
    "encode",
    "load",
    "method",
    "metric",
    "model",
    "named_weight_layers",
    "quantize_input",
    "runtime",
    "sweep",
    "weight_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'qbench' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
