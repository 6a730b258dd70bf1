"""The commands that only read results: `show` and `board`. They do without torch, whose import takes seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from qbench.analysis import curves, drawing
from qbench.board import tables
from qbench.errors import UserError
from qbench.markdown import publish
from qbench.progress import headline
from qbench.run import Result
from qbench.store import Store, find


def show(key: str, results: Path, out: Path | None = None, *, as_json: bool) -> None:
    """Print a result; draw how its training went into the folder `out`.

    Raises:
        UserError: there is no such result, the folder cannot be made, or nothing was trained.
    """
    store, full = find(results, key)
    result = store.read(full)
    assert result is not None
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


def board(folders: list[Path], *, as_json: bool) -> None:
    """Judge one folder of results, or several merged; the board goes into the first."""
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
    judged = tables((result for _, result in merged.values()), lambda key: merged[key][0].outcomes(key))
    written = publish(judged, stores[0].folder, title=stores[0].folder.name)
    print(json.dumps({"written": str(written)}) if as_json else written.read_text(encoding="utf-8"))
