"""The README.md and labels.txt beside an exported model: what it is, how to feed it, and what was measured."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qbench import registry
from qbench.errors import Unsupported, UserError
from qbench.models.base import Model, Preprocess
from qbench.quant.encodings import Affine, Codebook, Encoding
from qbench.quant.layers import encodings
from qbench.registry import Reference
from qbench.run import Result
from qbench.runtimes.integers import is_quantized, judge
from qbench.store import Store


@dataclass(frozen=True)
class Card:
    """What a card is made from."""

    format: str
    form: str
    files: dict[str, Path]
    batch: int | None
    """The number of images the file takes; None is any."""
    stored: dict[str, int]
    """Bytes of the constants of each type."""
    reference: Reference
    plugin: Model
    model: nn.Module
    artifact: Path
    agreement: float
    result: Result | None
    store: Store | None


def write_card(card: Card, folder: Path) -> None:
    """Write `README.md`, and `labels.txt` where the classes are known."""
    classes = _classes(card.result)
    if classes:
        (folder / "labels.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    sections = [
        f"# {card.plugin.name or card.reference}, quantized",
        _table(_facts(card, classes)),
        f"## Running it\n\n```python\n{snippet(card.plugin.preprocess, card.format)}\n```\n\n{_outputs(card)}",
        f"## What runs as integers\n\n{_integers(card.model, card.format)}",
        f"## Weights\n\n{_weights(card)}",
        f"## Provenance\n\n{_table(_provenance(card))}",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _facts(card: Card, classes: Sequence[str]) -> list[tuple[str, str]]:
    p = card.plugin.preprocess
    batch = "any" if card.batch is None else f"{card.batch}, fixed"
    return [
        ("task", card.plugin.task),
        ("recipe", card.result.recipe if card.result else "not known: exported from an artifact, not from a run"),
        *((f"accuracy ({name})", value) for name, value in _accuracy(card)),
        ("format", card.form),
        *((f"`{name}`", f"{path.stat().st_size:,} bytes, sha256 {_digest(path)}") for name, path in card.files.items()),
        ("input", f"float32, (batch, {p.channels}, {p.size[0]}, {p.size[1]}); batch: {batch}"),
        ("preprocessing", f"{_placing(p)}; divided by 255, minus mean {list(p.mean)}, over std {list(p.std)}"),
        ("classes", f"{len(classes)}, in `labels.txt`, a line each" if classes else "not known"),
    ]


def _accuracy(card: Card) -> list[tuple[str, str]]:
    if card.result is None or card.store is None:
        return []
    found = []
    if card.result.task == "classification":
        correct = card.store.outcomes(card.result.key)["correct"]
        found = [("top-1", f"{correct.mean():.2%}: {int(correct.sum())} of {len(correct)} evaluation images")]
    for name, metric in card.result.metrics.items():
        if metric.status == "ok" and "AP" in metric.values:
            found.append((name, f"AP {metric.values['AP']:.4f} on {metric.values['images']} evaluation images"))
    return [(name, f"{text}, by the packed network in PyTorch") for name, text in found]


def _placing(p: Preprocess) -> str:
    height, width = p.size
    colours = "RGB" if p.channels == 3 else "grey"
    how = {
        "crop": f"shorter side resized to {p.resize}, centre crop" if p.resize else "centre crop, no resizing",
        "squash": "resized to "
        + (f"{p.resize}x{p.resize}, centre crop" if p.resize else f"{height}x{width}, whatever its shape"),
        "letterbox": "resized to fit, centred on the mean colour",
    }[p.mode]
    return f"{colours}, {how} ({height}x{width}, height first), {p.interpolation} with antialias"


def snippet(p: Preprocess, target: str, path: str = "image.jpg") -> str:
    """Python that reads an image, prepares it and runs the model; it needs numpy, Pillow and the runtime only."""
    (height, width), filter_ = p.size, f"Image.Resampling.{p.interpolation.upper()}"
    lines = ["import numpy as np"]
    lines.append("import onnxruntime" if target == "onnx" else "import openvino")
    lines += ["from PIL import Image", ""]
    lines.append(f'image = Image.open("{path}").convert("{"RGB" if p.channels == 3 else "L"}")')
    if p.mode == "letterbox":
        fill = tuple(round(255 * value) for value in p.mean)
        lines += [
            f"ratio = min({width} / image.width, {height} / image.height)",
            "size = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))",
            f"small, image = image.resize(size, {filter_}), "
            f"Image.new(image.mode, ({width}, {height}), {fill if len(fill) == 3 else fill[0]})",
            f"image.paste(small, (({width} - size[0]) // 2, ({height} - size[1]) // 2))",
        ]
    elif p.mode == "squash":
        lines.append(f"image = image.resize({(p.resize, p.resize) if p.resize else (width, height)}, {filter_})")
    elif p.resize:
        lines += [
            f"w, h, side = *image.size, {p.resize}",
            "size = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)",
            f"image = image.resize(size, {filter_})",
        ]
    if p.mode == "crop" or (p.mode == "squash" and p.resize):
        lines += [
            "first = lambda have, want: round((have - want) / 2) if have >= want else -((want - have) // 2)",
            f"left, top = first(image.width, {width}), first(image.height, {height})",
            f"image = image.crop((left, top, left + {width}, top + {height}))",
        ]
    shape = f"np.asarray(image).reshape({height}, {width}, {p.channels})"
    lines.append(f"x = ({shape} / 255 - {list(p.mean)}) / {list(p.std)}")
    lines.append("x = x.astype(np.float32).transpose(2, 0, 1)[None]")
    if target == "onnx":
        lines += [
            "options = onnxruntime.SessionOptions()",
            "# Otherwise float inputs of linear layers with integer weights are rounded to 8 bits.",
            'options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")',
            'outputs = onnxruntime.InferenceSession("model.onnx", options).run(None, {"images": x})',
        ]
    else:
        lines.append('outputs = list(openvino.compile_model("model.xml", "CPU")(x).values())')
    return "\n".join(lines)


def _outputs(card: Card) -> str:
    if card.plugin.task == "classification":
        return "`outputs[0]` holds one score a class for each image, before the softmax."
    return (
        "`outputs` are those of the network, flattened. Decoding boxes and non-maximum suppression are outside of the "
        f"file: `qbench` has them as `decode` of the model `{card.reference}`."
    )


def _integers(model: nn.Module, target: str) -> str:
    if not is_quantized(model):
        return "Nothing: the network is float."
    try:
        integer, floats = judge(model)
    except Unsupported as error:
        return f"Nothing: the network is {error}. Integers save bytes here, and every layer computes in float."
    lines = [
        f"{len(integer)} layers and products have integer weights and integer inputs; a runtime with kernels for them "
        "can compute these as integers."
    ]
    if target == "onnx":
        lines[0] += (
            " ONNX Runtime does so for linear layers, but for a convolution only where a quantizer follows it directly "
            "or behind a ReLU; others compute in float."
        )
    lines += [f"- {count} in float: {reason}" for reason, count in Counter(floats.values()).most_common()]
    return "\n".join(lines)


def _weights(card: Card) -> str:
    kinds = Counter(map(_kind, encodings(card.model).values()))
    lines = [f"- {count} tensors: {kind}" for kind, count in kinds.most_common()]
    lines.append(
        "- bytes of constants in the file by type: "
        + ", ".join(f"{name} {count:,}" for name, count in sorted(card.stored.items()))
    )
    lines.append(f"- largest relative difference from the scored network's answers, on noise: {card.agreement:.1e}")
    return "\n".join(lines)


def _kind(encoding: Encoding) -> str:
    if isinstance(encoding, Affine):
        rows, groups = encoding.scale.shape
        spread = f"groups of {encoding.group_size}" if groups > 1 else "output channel" if rows > 1 else "tensor"
        shift = ", with zero points" if encoding.zero_point is not None else ""
        return f"codes {encoding.low} to {encoding.high}, a scale per {spread}{shift}"
    if isinstance(encoding, Codebook):
        return f"codebooks of {encoding.levels.shape[-1]} levels"
    return type(encoding).__name__


def _provenance(card: Card) -> list[tuple[str, str]]:
    rows = [("float model", f"`{card.reference}`"), ("sha256 of the artifact", _digest(card.artifact))]
    if card.result is None:
        return rows
    identity, made = card.result.identity, card.result.provenance
    return [
        *rows,
        ("hash of the float weights", str(identity["model"][2])),
        ("run", f"`{card.result.key}`, {card.result.label}, started {card.result.started}"),
        ("dataset", f"`{identity['dataset'][0]}`, fingerprint {identity['dataset'][2]}"),
        ("calibration", f"{identity['calibration'][0]} images, manifest {identity['calibration'][2]}"),
        ("made by", f"qbench {made.get('qbench')}, git {made.get('git')}, engine {made.get('engine')}"),
    ]


def _classes(result: Result | None) -> list[str]:
    if result is None:
        return []
    name, options, _ = result.identity["dataset"]
    try:
        return list(registry.resolve("dataset", name, options)().classes)
    except (UserError, OSError):  # the data need not be where the model is exported
        return []


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
