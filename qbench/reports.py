"""The commands that only read results: `show` and `board`. They do without torch, whose import takes seconds."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from qbench.analysis import curves, drawing
from qbench.board import tables
from qbench.errors import UserError
from qbench.judges import size_cells
from qbench.markdown import frame, publish, render
from qbench.progress import headline
from qbench.run import Result
from qbench.store import Store, find
from qbench.timings import write_pyperf

_SIZES = {
    "nominal": "bits times numbers",
    "entropy_coded": "codes at their entropy",
    "packed": "tensors of the artifact",
    "file": "artifact",
    "gzip": "artifact behind gzip",
    "onnx": "ONNX",
    "openvino": "OpenVINO",
}


def show(
    key: str, results: Path, out: Path | None = None, *, pyperf: Path | None = None, as_json: bool = False
) -> None:
    """Print a result; draw how its training went into the folder `out`; or write its times for pyperf.

    Raises:
        UserError: there is no such result, a folder or file cannot be written, or nothing was trained or timed.
    """
    store, full = find(results, key)
    result = store.read(full)
    assert result is not None
    if pyperf is not None:
        write_pyperf(result, pyperf)
        return
    if out is not None:
        _draw(result, out)
    if as_json:
        print(result.model_dump_json(indent=1))
        return
    console = Console(highlight=False)
    console.print(f"[bold]{full}[/bold]  ", end="")
    console.print(f"{result.label}: {headline(result)}", markup=False)
    for title, fields in (
        ("bits", result.bits),
        ("artifact", result.artifact),
        ("scoring", result.scoring),
        ("seconds", result.seconds),
        ("provenance", result.provenance),
    ):
        _section(console, title, fields)
    for name, metric in result.metrics.items():
        _section(console, f"metric {name} ({metric.unit})", metric.values or {metric.status: metric.error})
        if name.partition("[")[0] == "size" and metric.status == "ok":
            console.print(_sizes(metric.values))
        if "considered" in metric.values:
            console.print(_considered(metric.values["runtime"], metric.values["considered"]))
    if "training" in result.records:
        console.print(f"loss: {curves.summary(result.records['training']['loss'])}")
    _section(console, "records", result.records)
    if result.traceback:
        console.print(result.traceback, markup=False)


def _draw(result: Result, folder: Path) -> None:
    drawing.check_installed("curves")
    found = curves.panels(result.records)
    if not found:
        raise UserError(f"{result.label} has not trained anything; leave out -o")
    drawing.make(folder)
    curves.write(found, result.label, folder)
    print(f"training.png and training.html are in {folder}", file=sys.stderr)


def _section(console: Console, title: str, fields: dict[str, Any]) -> None:
    if not fields:
        return
    table = RichTable(title=title, show_header=False, title_justify="left", box=None, padding=(0, 2))
    for name, value in fields.items():
        text = json.dumps(value) if not isinstance(value, str) else value
        table.add_row(name, text if len(text) < 160 else text[:157] + "...")
    console.print(table)


def _sizes(values: dict[str, Any]) -> RichTable:
    """All sizes of one network, in bytes and MiB, and how many times smaller than the same of the float network."""
    judged, known = size_cells([values]), values.get("formats", {})
    table = RichTable("size", "bytes", "MiB", "float / it", title="sizes", title_justify="left", box=None)
    for name, title in _SIZES.items():
        if (count := judged.get(f"{name}_bytes")) is not None:
            reference = known.get(name, {}).get("float_bytes", values["float_bytes"])
            table.add_row(title, f"{count:,.0f}", f"{count / 2**20:.3f}", f"{reference / count:.2f}")
    for name, found in known.items():
        if "reason" in found:
            table.add_row(_SIZES[name], "", "", escape(found["reason"]))
    return table


def _considered(taken: str, considered: dict[str, dict[str, Any]]) -> RichTable:
    """Why this runtime was taken: the medians of a few calls, or what speaks against the others."""
    table = RichTable(
        "runtime", "median ms", "layers on integers", "", title="runtimes", title_justify="left", box=None
    )
    for name, found in considered.items():
        ms = f"{1000 * statistics.median(found['seconds']):.3g}" if "seconds" in found else ""
        layers = f"{found['integer_layers']} of {found['layers']}" if "layers" in found else ""
        table.add_row(name, ms, layers, "taken" if name == taken else escape(found.get("reason", "")))
    return table


def board(folders: list[Path], *, profile: str | None, as_json: bool) -> None:
    """Judge one folder of results, or several merged; the board goes into the first.

    Under a profile of hardware it is printed, and the one in the folder stays.
    """
    stores = [Store(folder) for folder in folders]
    merged: dict[str, tuple[Store, Result]] = {}
    for store in stores:
        known, damaged = store.read_all()
        for line in damaged:
            print(line, file=sys.stderr)
        if not known:
            raise UserError(
                f"{store.folder} holds no results; give the folder of a suite, for example results/quickstart"
            )
        merged |= {key: (store, result) for key, result in known.items()}
    results = (result for _, result in merged.values())
    judged = tables(results, lambda key: merged[key][0].outcomes(key), profile)
    if profile is not None:
        print(frame(judged).to_json(orient="records") if as_json else render(judged, title=f"Under {profile}"))
        return
    written = publish(judged, stores[0].folder, title=stores[0].folder.name)
    print(json.dumps({"written": str(written)}) if as_json else written.read_text(encoding="utf-8"))
