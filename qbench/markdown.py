"""A judged board as LEADERBOARD.md for people and leaderboard.csv for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from qbench.board import Row, Table
from qbench.run import Result
from qbench.stats import Interval
from qbench.store import write_atomically

NOT_MEASURED = "–"
_SCORE = {"classification": "top-1 %", "detection": "mAP %"}
Cell = Callable[[dict[str, Any]], str | None]


def _number(key: str, form: str, scale: float = 1.0) -> Cell:
    def cell(cells: dict[str, Any]) -> str | None:
        return None if cells.get(key) is None else format(cells[key] * scale, form)

    return cell


def _interval(key: str, form: str) -> Cell:
    def cell(cells: dict[str, Any]) -> str | None:
        value: Interval | None = cells.get(key)
        if value is None:
            return None
        mark = " unstable" if cells.get(f"{key}_unstable") else ""
        return f"{value.estimate:{form}} [{value.low:{form}}, {value.high:{form}}]{mark}"

    return cell


# Title, the metric that it belongs to, and how the judged cell is written.
COLUMNS: list[tuple[str, str, Cell]] = [
    ("size MiB", "size", _number("file_bytes", ".3f", 1 / 2**20)),
    ("ratio", "size", _number("compression_ratio", ".2f")),
    ("coverage % W / MAC", "coverage", lambda c: _pair(c, "weights_covered", "macs_covered")),
    ("int8 / float latency", "latency", _interval("latency_ratio", ".2f")),
    ("cost s", "cost", _number("cost_seconds", ".1f")),
    ("train step / float", "training_time", _interval("step_ratio", ".2f")),
    ("mJ / image", "energy", _number("energy_mj", ".2f")),
]


def _pair(cells: dict[str, Any], first: str, second: str) -> str | None:
    if cells.get(first) is None:
        return None
    return f"{100 * cells[first]:.0f} / {100 * cells[second]:.0f}"


def publish(boards: list[Table], folder: Path, *, title: str, description: str = "") -> Path:
    """Write LEADERBOARD.md and leaderboard.csv into the folder; returns the path of the former."""
    page = folder / "LEADERBOARD.md"
    text = render(boards, title=title, description=description)
    write_atomically(page, lambda partial: partial.write_text(text, encoding="utf-8"))
    write_atomically(folder / "leaderboard.csv", lambda partial: frame(boards).to_csv(partial, index=False))
    return page


def render(boards: list[Table], *, title: str, description: str = "") -> str:
    """The whole page."""
    parts = [f"# {title}", description, *(section(board) for board in boards), _legend()]
    return "\n\n".join(part for part in parts if part) + "\n"


def section(board: Table) -> str:
    """The table of one model, its notes, and where the numbers come from."""
    rows = board.rows
    shown = [c for c in COLUMNS if any(c[2](row.cells) is not None for row in rows)]
    extra = sorted({key for row in rows for key in row.cells if key.endswith(")")})
    notes: dict[str, int] = {}
    lines = [_line(row, board, shown, extra, notes) for row in rows]
    headers = ["#", "recipe", "W / A bits", _SCORE[board.task], "Δ to float [95 %]"]
    headers += [title for title, _, _ in shown] + extra + ["status"]
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    absent = _absent(rows, {metric for _, metric, _ in shown})
    below = [f"<sup>{number}</sup> {text}" for text, number in notes.items()] + absent
    return "\n\n".join([f"## {board.dataset} · {board.model}", table, "  \n".join(below), _provenance(rows)])


def _line(
    row: Row, board: Table, shown: list[tuple[str, str, Cell]], extra: list[str], notes: dict[str, int]
) -> list[str]:
    name = row.recipe if len(row.results) == 1 else f"{row.recipe} ({len(row.results)} seeds)"
    score = NOT_MEASURED if row.score is None else f"{100 * row.score:.2f}"
    reference = board.reference is row
    line = [row.rank, f"{name} (reference)" if reference else name, _bits(row), score, _drop(row.drop)]
    for _, metric, cell in shown:
        text = cell(row.cells)
        if text is None:
            reason = next((note for key, note in row.notes.items() if key.partition("[")[0] == metric), None)
            text = NOT_MEASURED
            if reason:
                number = notes.setdefault(f"{metric}: {reason}", len(notes) + 1)
                text += f" <sup>{number}</sup>"
        line.append(text)
    line += [NOT_MEASURED if key not in row.cells else f"{row.cells[key]:.4g}" for key in extra]
    status = row.status
    if status != "ok":
        error = next(r.error for r in row.results if r.status != "ok")
        status += f" <sup>{notes.setdefault(f'{row.recipe}: {_first_line(error)}', len(notes) + 1)}</sup>"
    return [*line, status]


def _first_line(text: str | None) -> str:
    return (text or "no reason given").splitlines()[0]


def _bits(row: Row) -> str:
    if not row.cells:
        return NOT_MEASURED
    weights, inputs = (row.cells.get(key) for key in ("weight_bits", "activation_bits"))
    return " / ".join("32" if bits is None else f"{bits:.3g}" for bits in (weights, inputs))


def _drop(drop: Interval | None) -> str:
    if drop is None:
        return NOT_MEASURED
    return f"{100 * drop.estimate:+.2f} [{100 * drop.low:+.2f}, {100 * drop.high:+.2f}]"


def _absent(rows: list[Row], shown: set[str]) -> list[str]:
    """One line for each metric that no row has."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for metric, reason in row.notes.items():
            if metric.partition("[")[0] not in shown and reason not in reasons.setdefault(metric, []):
                reasons[metric].append(reason)
    return [f"{metric}: {'; '.join(texts)}" for metric, texts in reasons.items()]


def _provenance(rows: list[Row]) -> str:
    results = [r for row in rows for r in row.results]
    first = next((r for r in results if r.status == "ok"), results[0])
    (dataset, _, data_hash), (model, _, weights) = first.identity["dataset"], first.identity["model"]
    images, seed, manifest = first.identity["calibration"]
    made = sorted(r.started for r in results)
    machines = sorted({_machine(r) for r in results if r.status == "ok"})
    versions = sorted({_versions(r) for r in results if r.status == "ok"})
    scored = first.scoring.get("images")
    return "  \n".join(
        [
            f"model {model}, weights `{weights}`; data {dataset} `{data_hash}`, {scored} images scored; "
            f"calibration: {images} images, seed {seed}, manifest `{manifest}`",
            *(f"machine: {text}" for text in machines),
            *(f"software: {text}" for text in versions),
            f"measured {made[0][:10]}" + (f" to {made[-1][:10]}" if made[-1][:10] != made[0][:10] else ""),
        ]
    )


def _machine(result: Result) -> str:
    p = result.provenance
    return ", ".join(str(p[key]) for key in ("cpu", "cores", "gpu") if p.get(key))


def _versions(result: Result) -> str:
    packages: dict[str, str] = result.provenance.get("packages", {})
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _legend() -> str:
    return (
        "Every row was scored on its packed file, loaded back. Bits are averages over what was quantized, size is that "
        "of the file, coverage the share of weights and of multiply-accumulates that were quantized. Δ is paired over "
        "the same images; rows with the same rank cannot be told apart at 95 %. Latency is that of integer kernels in a "
        "real runtime, interleaved with the float network of the same runtime; below 1 is faster than float."
    )


def frame(boards: Iterable[Table]) -> pd.DataFrame:
    """One line for each row of each table, numbers unrounded."""
    return pd.DataFrame([_record(board, row) for board in boards for row in board.rows])


def _record(board: Table, row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {
        "dataset": board.dataset,
        "model": board.model,
        "recipe": row.recipe,
        "seeds": len(row.results),
        "rank": row.rank,
        "status": row.status,
        "score": row.score,
    }
    for name, value in {"difference": row.drop, **row.cells}.items():
        if isinstance(value, Interval):
            record |= {name: value.estimate, f"{name}_low": value.low, f"{name}_high": value.high}
        elif value is not None:
            record[name] = value
    record |= {f"{name}_note": reason for name, reason in row.notes.items()}
    return record | {"key": row.key, "weights": row.results[0].identity["model"][2]}
