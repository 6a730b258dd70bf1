"""Heat maps of sensitivities: a picture, and a page to look into. Needs the extra `analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qbench.analysis.sensitivity import Sensitivity

TITLES = {
    "kl": "divergence of the predictions, nats",
    "loss": "increase of the loss",
    "sqnr": "SQNR of the output, dB",
    "hawq": "mean curvature × squared error",
    "fisher": "Fisher-weighted squared error",
}
"""What the values of each measure are."""
_LOG = ("kl", "hawq", "fisher")
_COLOURS = "viridis"


def write(found: Sensitivity, title: str, folder: Path) -> None:
    """Draw `sensitivity.png` and `sensitivity.html` into the folder."""
    _picture(found, title).savefig(folder / "sensitivity.png", dpi=150, bbox_inches="tight")
    _page(found, title).write_html(folder / "sensitivity.html", include_plotlyjs=True)


def shades(found: Sensitivity) -> np.ndarray:
    """(layers, bits): the height on the colour scale: the logarithm to base 10 where values span magnitudes.

    What has none (no change at all, or no error) takes the end of the scale.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        heights = np.log10(found.values) if found.measure in _LOG else np.array(found.values)
    finite = heights[np.isfinite(heights)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    return np.nan_to_num(heights, nan=low, neginf=low, posinf=high)


def label(value: float) -> str:
    """Two significant digits, in as few characters as they need."""
    if value == 0 or not np.isfinite(value):
        return f"{value:.0f}"
    return f"{value:.2g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _colours(found: Sensitivity) -> str:
    """Bright is bad: a high SQNR is good."""
    return _COLOURS + ("_r" if found.measure == "sqnr" else "")


def _picture(found: Sensitivity, title: str) -> Any:
    from matplotlib.figure import Figure

    heights = shades(found)
    layers, widths = heights.shape
    figure = Figure(figsize=(2.5 + 0.75 * widths, 1.2 + 0.22 * layers))
    axes = figure.add_subplot()
    image = axes.imshow(heights, aspect="auto", cmap=_colours(found))
    axes.set_xticks(range(widths), [f"{bits}" for bits in found.bits])
    axes.set_yticks(range(layers), found.layers, fontsize=8, family="monospace")
    axes.set_xlabel("bits")
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=9, loc="left")
    for (row, column), value in np.ndenumerate(found.values):
        red, green, blue, _ = image.cmap(image.norm(heights[row, column]))
        ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
        axes.text(column, row, label(value), ha="center", va="center", fontsize=7, color=ink)
    bar = figure.colorbar(image, ax=axes, fraction=0.06, pad=0.03)
    bar.set_label(TITLES[found.measure], fontsize=8)
    if found.measure in _LOG:
        bar.ax.yaxis.set_major_formatter(lambda height, _: f"{10**height:.0e}")
    bar.ax.tick_params(labelsize=7)
    return figure


def _page(found: Sensitivity, title: str) -> Any:
    from plotly import graph_objects

    heat = graph_objects.Heatmap(
        z=shades(found),
        x=[f"{bits} bits" for bits in found.bits],
        y=list(found.layers),
        text=[[label(value) for value in row] for row in found.values],
        customdata=found.values,
        texttemplate="%{text}",
        hovertemplate="%{y}, %{x}: %{customdata:.4g}<extra></extra>",
        colorscale=_colours(found),
        colorbar={"title": ("log10 of " if found.measure in _LOG else "") + TITLES[found.measure]},
    )
    layout = {"title": title, "height": 200 + 22 * len(found.layers), "yaxis": {"autorange": "reversed", "dtick": 1}}
    return graph_objects.Figure(heat, layout)
