"""`qbench export`: the network of a run or an artifact as a file that other programs run, with a model card."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qbench import registry
from qbench.cache import cache_dir
from qbench.card import Card, write_card
from qbench.errors import Unsupported, UserError
from qbench.models.base import Model
from qbench.quant import packing
from qbench.registry import Reference
from qbench.run import Result
from qbench.runtimes.base import flatten
from qbench.store import Store, find

_IMAGES = 4


@dataclass(frozen=True)
class Source:
    """What is exported."""

    artifact: Path
    result: Result | None = None
    """Of the run; None for an artifact alone."""
    store: Store | None = None


@dataclass(frozen=True)
class Written:
    """A file in a format, and how to run it."""

    files: tuple[str, ...]
    form: str
    batch: int | None
    """The number of images it takes; None is any."""
    stored: dict[str, int]
    """Bytes of the constants of each type."""
    run: Callable[[np.ndarray], list[np.ndarray]]


def export(what: str, out: Path, target: str, *, results: Path, plugins: list[str]) -> None:
    """Write the model and its card into a folder: everything, or nothing.

    Args:
        what: key of a run, or the beginning of it; or the file of an artifact.
        out: folder, made if need be.
        target: `onnx` or `openvino`.
        results: folder in which the key is looked for.
        plugins: files with further plugins.

    Raises:
        UserError: an argument is wrong, or the network cannot be written in this format.
    """
    if target not in _WRITERS:
        raise UserError(f"--format {target!r}: write {' or '.join(_WRITERS)}")
    registry.load_plugins(plugins)
    source = locate(what, results)
    staging = _stage(out)
    try:
        model = packing.load(source.artifact)
        reference = _reference(source.artifact)
        plugin: Model = reference()
        try:
            written = _WRITERS[target](model, _noise(plugin, 1), staging)
        except Unsupported as error:
            raise UserError(f"{what} cannot be written as {target}: {error}") from error
        card = Card(
            format=target,
            form=written.form,
            files={name: staging / name for name in written.files},
            batch=written.batch,
            stored=written.stored,
            reference=reference,
            plugin=plugin,
            model=model,
            artifact=source.artifact,
            agreement=_agreement(model, written, _noise(plugin, _IMAGES)),
            result=source.result,
            store=source.store,
        )
        write_card(card, staging)
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{', '.join(written.files)} and README.md are in {out}")


def locate(what: str, results: Path) -> Source:
    """The artifact that a path or a key means.

    Raises:
        UserError: there is none.
    """
    path = Path(what)
    if path.is_file():
        return Source(path)
    if path.suffix == ".safetensors" or "/" in what:
        raise UserError(f"artifact {what} does not exist; give its path, or the key of a run")
    store, key = find(results, what)
    result = store.read(key)
    assert result is not None
    if result.status != "ok":
        raise UserError(f"run {key} ended with status {result.status}: there is nothing to export")
    artifact = cache_dir() / "artifacts" / f"{key}.safetensors"
    if not artifact.is_file():
        raise UserError(f"the artifact of run {key} is no longer at {artifact}; run its suite with --redo all")
    return Source(artifact, result, store)


def _reference(artifact: Path) -> Reference:
    origin = packing.read(artifact)[0]["origin"]
    return registry.resolve("model", origin["model"], origin["options"], where=str(artifact))


def _stage(out: Path) -> Path:
    """A temporary folder on the disk of `out`, which itself is not touched."""
    nearest = out if not out.is_file() else out / "model"
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        return Path(tempfile.mkdtemp(prefix=".qbench-", dir=nearest))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}: {nearest}); choose another with -o") from error


def _publish(staging: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        path.replace(out / path.name)


def _noise(plugin: Model, count: int) -> Tensor:
    height, width = plugin.preprocess.size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, plugin.preprocess.channels, height, width, generator=generator)


@torch.no_grad()
def _agreement(model: nn.Module, written: Written, images: Tensor) -> float:
    """The largest distance of the file's answers on an image from the network's, relative to their size (2-norms)."""
    size = written.batch or len(images)
    largest = 0.0
    for batch in images.split(size):
        wanted = np.concatenate([t.numpy().reshape(size, -1) for t in flatten(model(batch))], axis=1)
        found = np.concatenate([a.reshape(size, -1) for a in written.run(batch.numpy())], axis=1)
        distances = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        largest = max(largest, float(distances.max()))
    return largest


# ---------------------------------------------------------------------------------------------------- the formats


def _write_onnx(model: nn.Module, example: Tensor, folder: Path) -> Written:
    from qbench.runtimes.files import write_onnx
    from qbench.runtimes.onnx_graph import INPUT, OPSET, import_onnx
    from qbench.runtimes.onnxruntime import open_session

    path = write_onnx(model, example, folder, dynamic=True)
    onnx = import_onnx()
    stored: Counter[str] = Counter()
    for tensor in onnx.load(path).graph.initializer:
        stored[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += len(tensor.raw_data)
    session = open_session(str(path), optimize=False)
    return Written(
        files=(path.name,),
        form=f"ONNX, opset {OPSET}",
        batch=None,
        stored=dict(stored),
        run=lambda batch: session.run(None, {INPUT: batch}),
    )


def _write_openvino(model: nn.Module, example: Tensor, folder: Path) -> Written:
    from qbench.runtimes.files import write_openvino
    from qbench.runtimes.openvino import import_openvino

    path = write_openvino(model, example, folder)
    ov = import_openvino()
    core = ov.Core()
    reread = core.read_model(path)
    stored: Counter[str] = Counter()
    for operation in reread.get_ops():
        if operation.get_type_name() == "Constant":
            stored[operation.get_element_type().get_type_name()] += operation.get_byte_size()
    compiled = core.compile_model(reread, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return Written(
        files=(path.name, path.with_suffix(".bin").name),
        form=f"OpenVINO IR {ov.get_version().partition('-')[0]}",
        batch=len(example),
        stored=dict(stored),
        run=lambda batch: list(compiled([batch]).values()),
    )


_WRITERS: dict[str, Callable[[nn.Module, Tensor, Path], Written]] = {"onnx": _write_onnx, "openvino": _write_openvino}
