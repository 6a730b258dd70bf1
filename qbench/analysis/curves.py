"""How a training went: its loss, and what quantizers learned, as a picture and as a page. Needs the extra `analyze`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_WINDOW = 50
"""Over a share of one in so many of all steps the loss is averaged."""


@dataclass(frozen=True)
class Panel:
    """Curves over the same steps."""

    title: str
    steps: list[int]
    curves: dict[str, list[float]]
    log: bool = False
    """Whether the values span magnitudes and are all above 0."""


def panels(records: Mapping[str, Any]) -> list[Panel]:
    """What there is to draw in the records of a run: none if nothing was trained."""
    found: list[Panel] = []
    if "training" in records:
        loss = records["training"]["loss"]
        curves = {"each step": loss, "average": smooth(loss)}
        found.append(Panel("loss", list(range(len(loss))), curves, _spans(loss)))
    for name, record in records.items():
        if isinstance(record, dict) and record.get("state") and "steps" in record:
            for part in sorted({key.rpartition(".")[2] for key in record["state"]}):
                curves = {key: values for key, values in record["state"].items() if key.rpartition(".")[2] == part}
                title = f"{name}: mean {part} of each quantizer"
                found.append(Panel(title, record["steps"], curves, _spans([v for c in curves.values() for v in c])))
    return found


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and those before it, over a fiftieth of them all."""
    window = max(1, len(values) // _WINDOW)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    smoothed: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return smoothed


def summary(loss: list[float]) -> str:
    """Start, end and least of the averaged loss."""
    averages = smooth(loss)
    least = int(np.argmin(averages))
    return f"{loss[0]:.4g} at the start, {averages[-1]:.4g} at the end, lowest {averages[least]:.4g} at step {least}"


def write(found: list[Panel], title: str, folder: Path) -> None:
    """Draw `training.png` and `training.html` into the folder."""
    _picture(found, title).savefig(folder / "training.png", dpi=150, bbox_inches="tight")
    _page(found, title).write_html(folder / "training.html", include_plotlyjs=True)


def _spans(values: list[float]) -> bool:
    finite = [value for value in values if np.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 20 * min(finite)


def _picture(found: list[Panel], title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + 2.6 * len(found)))
    for number, panel in enumerate(found, start=1):
        axes = figure.add_subplot(len(found), 1, number)
        for name, values in panel.curves.items():
            faint = name == "each step"
            axes.plot(panel.steps, values, label=name, linewidth=0.5 if faint else 1.2, alpha=0.5 if faint else 1)
        axes.set_yscale("log" if panel.log else "linear")
        axes.set_title(panel.title, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        if len(panel.curves) <= 12:
            axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("step", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure


def _page(found: list[Panel], title: str) -> Any:
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(found), cols=1, shared_xaxes=True, subplot_titles=[p.title for p in found])
    for row, panel in enumerate(found, start=1):
        for name, values in panel.curves.items():
            figure.add_scatter(x=panel.steps, y=values, name=name, mode="lines", row=row, col=1)
        figure.update_yaxes(type="log" if panel.log else "linear", row=row, col=1)
    figure.update_xaxes(title="step", row=len(found), col=1)
    figure.update_layout(title=title, height=150 + 300 * len(found))
    return figure
