"""`qbench analyze`: which layers suffer from which bit widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qbench import registry
from qbench.analysis import drawing, heatmap
from qbench.analysis.sensitivity import AnyMeasure, Sensitivity, rounded, sensitivity
from qbench.cache import cache_dir
from qbench.devices import best_device
from qbench.errors import UserError
from qbench.methods.mixed import rounding
from qbench.workspace import Workspace


def analyze(
    model: str,
    dataset: str,
    out: Path | None,
    *,
    plugins: list[str],
    bits: str,
    measure: str,
    method: str,
    images: int,
    seed: int,
) -> None:
    """Print a table of layers and bit widths, and write it and its heat maps into a folder.

    Args:
        model: reference of the model.
        dataset: reference of the dataset; its calibration images are used, and for `loss` its training images.
        out: gets `sensitivity.csv`, `.json`, `.png` and `.html`; None only prints.
        plugins: files with further plugins.
        bits: the widths, with commas between them.
        measure: see `qbench.analysis.sensitivity.Sensitivity`.
        method: rounds the weights.
        images: how many, drawn from the training split.
        seed: they are drawn with.

    Raises:
        UserError: an argument is wrong, or the folder cannot be written.
    """
    registry.load_plugins(plugins)
    step = registry.resolve("method", *registry.parse(rounding(method)))
    if measure not in heatmap.TITLES:
        raise UserError(f"--measure {measure!r}: write one of {', '.join(heatmap.TITLES)}")
    widths = _widths(bits)
    if out is not None:
        drawing.check_installed("heat maps")
        drawing.make(out)
    device = best_device()
    space = Workspace(
        registry.resolve("dataset", *registry.parse(dataset)),
        registry.resolve("model", *registry.parse(model)),
        (images, seed),
        cache_dir(),
        device,
    )
    data = space.data(seed=seed, trains=measure == "loss")
    network = space.model.load().to(device)
    weights = rounded(network, data, step, widths)
    found = sensitivity(network, weights, data, cast(AnyMeasure, measure), images)
    title = f"{model} on {dataset}, each layer alone rounded by {method}"
    _show(found, title)
    if out is not None:
        _write(found, out, {"model": model, "dataset": dataset, "method": method, "seed": seed})
        heatmap.write(found, title, out)
        print(f"sensitivity.csv, .json, .png and .html are in {out}")


def _widths(text: str) -> list[int]:
    try:
        widths = sorted({int(part) for part in text.split(",")}, reverse=True)
    except ValueError:
        raise UserError(f"--bits {text!r}: write bit widths with commas between them: 8,4,3,2") from None
    return widths


def _show(found: Sensitivity, title: str) -> None:
    table = Table(title=escape(f"{title}: {heatmap.TITLES[found.measure]}"), title_justify="left", box=None)
    table.add_column("layer", no_wrap=True)
    for bits in found.bits:
        table.add_column(f"{bits} bits", justify="right")
    for name, row in zip(found.layers, found.values, strict=True):
        table.add_row(escape(name), *map(heatmap.label, row))
    console = Console(highlight=False)
    console.print(table)
    if "probes" in found.notes:
        traces, probes = found.notes["trace"], sum(found.notes["probes"].values())
        errors = [error / max(abs(traces[name]), 1e-30) for name, error in found.notes["standard_error"].items()]
        console.print(f"{probes} probes in all; standard errors of the traces: {min(errors):.1%} to {max(errors):.1%}")


def _write(found: Sensitivity, folder: Path, origin: dict[str, Any]) -> None:
    frame = pd.DataFrame(found.values, index=pd.Index(found.layers, name="layer"), columns=list(found.bits))
    frame.to_csv(folder / "sensitivity.csv")
    finite = frame.astype(object).where(np.isfinite(frame), None)
    values = {"values": finite.rename(columns=str).to_dict("index")}
    text = json.dumps(origin | {"measure": found.measure} | found.notes | values, indent=1)
    (folder / "sensitivity.json").write_text(text, encoding="utf-8")
