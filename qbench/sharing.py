"""What several runs compute alike about a network and its calibration images: by one of them, for all."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qbench.cache import Damaged, cache_limit, obtain
from qbench.quant import activations, structure
from qbench.run import engine

Arrays = dict[str, np.ndarray]
_SHARE = 20  # of the limit for images, one part in so many
_ENTRY = 50_000_000  # bytes for which room is made
_SECONDS = "seconds"


class Shared:
    """Arrays kept in a folder of the cache; without a folder everything is computed.

    Args:
        folder: of the entries.
        origin: JSON-able; what names the architecture of the networks: the model plugin, its options and its source.

    Attributes:
        seconds: what computing would have taken longer than reading did, in all.
        images: the most images that anything read was computed from.
    """

    def __init__(self, folder: Path | None = None, origin: Any = None) -> None:
        self._folder, self._origin = folder, origin
        self.seconds, self.images = 0.0, 0

    def arrays(
        self, name: str, network: nn.Module, images: tuple[str, int], compute: Callable[[], Mapping[str, np.ndarray]]
    ) -> Arrays:
        """What `compute` returns, bit for bit: read if it has been computed for an equal network and equal images.

        Networks are equal if they would make the same artifact: of one model, with the same structural changes, the
        same tensors, and the same input quantizers.

        Args:
            name: of what is computed, with all that it depends on besides the network and the images.
            network: as it is now.
            images: their fingerprint, and how many there are; an empty fingerprint is that of no others.
            compute: called where there is nothing to read.
        """
        if self._folder is None or not images[0]:
            return dict(compute())
        begin, computed = time.perf_counter(), False

        def write(entry: Path) -> None:
            nonlocal computed
            start, computed = time.perf_counter(), True
            found = {f"array {key}": value for key, value in compute().items()}
            found[_SECONDS] = np.array(time.perf_counter() - start)
            np.savez_compressed(entry / "arrays.npz", allow_pickle=False, **found)

        limit = cache_limit() // _SHARE
        key = self._key(name, network, images[0])
        found, seconds = obtain(self._folder, key, _read, write, min(_ENTRY, limit), limit)
        if not computed:
            self.seconds += seconds - (time.perf_counter() - begin)
            self.images = max(self.images, images[1])
        return found

    def _key(self, name: str, network: nn.Module, images: str) -> str:
        quantizers = {key: activations.describe(q) for key, q in activations.input_quantizers(network).items()}
        machine = [torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
        state = network.state_dict()
        tensors = [[key, str(value.dtype), list(value.shape), str(value.device)] for key, value in state.items()]
        identity = [engine(), machine, name, images, self._origin, structure.record(network), quantizers, tensors]
        digest = hashlib.sha256(json.dumps(identity, default=str).encode())
        for value in state.values():
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:24]


def _read(entry: Path) -> tuple[Arrays, float]:
    try:
        with np.load(entry / "arrays.npz", allow_pickle=False) as stored:
            found = {key.removeprefix("array "): stored[key] for key in stored.files if key != _SECONDS}
            return found, float(stored[_SECONDS])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Damaged(entry) from error
