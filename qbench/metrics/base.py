"""What a metric measures: a finished run, after its artifact was loaded back and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qbench.data import Data
from qbench.datasets.base import Dataset
from qbench.datasets.images import ImageArray
from qbench.models.base import Model
from qbench.quant import structure
from qbench.quant.packing import Sizes
from qbench.runtimes.integers import is_quantized


@dataclass(frozen=True)
class Finished:
    """A finished run. A metric returns JSON-able raw measurements of it, or raises `Unsupported("why")`.

    Arrays under the key `outcomes` are kept with the run's own, under the metric's name.
    """

    model: Model
    """The float model's plugin: preprocessing, loss, decoding."""
    quantized: nn.Module
    """Loaded back from the artifact, in evaluation mode."""
    load_float: Callable[[], nn.Module]
    """The float model, loaded afresh."""
    artifact: Path
    sizes: Sizes
    float_bytes: int
    """Size of the float model's own artifact on disk."""
    dataset: Dataset
    images: ImageArray
    """The evaluation images."""
    outcomes: Mapping[str, np.ndarray]
    """Per evaluation image, as `qbench.score` leaves them."""
    data: Data
    cost: Mapping[str, Any]
    """Of quantizing: `seconds`, `peak_memory_bytes`, `images`."""
    records: Mapping[str, Any]
    """What the methods recorded through `data.record`."""
    threads: int
    """Cores that this run may use."""
    cache: Path
    """Folder for what may be kept between runs."""

    @property
    def is_reference(self) -> bool:
        """Nothing is quantized, nor is the structure another: it is the float network."""
        return not (is_quantized(self.quantized) or structure.record(self.quantized))
