"""A judged board as LEADERBOARD.md for people and leaderboard.csv for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from qbench.board import Row, Table
from qbench.run import Result
from qbench.stats import Interval
from qbench.store import write_atomically

NOT_MEASURED = "–"
_SCORE = {"classification": "top-1 %", "detection": "mAP % [95 %]"}
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
        mark = "".join(f" {word}" for word in ("unstable", "saturates") if cells.get(f"{key}_{word}"))
        return f"{value.estimate:{form}} [{value.low:{form}}, {value.high:{form}}]{mark}"

    return cell


# Title, the metric that it belongs to, and how the judged cell is written.
COLUMNS: list[tuple[str, str, Cell]] = [
    ("AP50 %", "map", _number("AP50", ".2f", 100)),
    ("size MiB", "size", _number("file_bytes", ".3f", 1 / 2**20)),
    ("ratio", "size", _number("compression_ratio", ".2f")),
    ("coverage % W / MAC", "coverage", lambda c: _coverage(c)),
    ("int8 / float latency", "latency", lambda c: _latency(c)),
    ("… to boxes", "latency", lambda c: _latency(_with_option(c, "decoding=true"))),
    ("images / s", "throughput", lambda c: _throughput(c)),
    ("peak MiB", "memory", lambda c: _memory(c)),
    ("deployed", "parity", lambda c: _deployed(c)),
    ("fits", "placement", lambda c: c.get("fits")),
    ("cost s", "cost", _number("cost_seconds", ".1f")),
    ("train step / float", "training_time", _interval("step_ratio", ".2f")),
    ("training time saved %", "training_time", _number("training_time_reduction_percent", "+.0f")),
    ("training memory / float", "training_time", _number("training_memory_ratio", ".2f")),
    ("loss / float: equal steps", "training_time", lambda c: _losses(c, "steps")),
    ("loss / float: equal time", "training_time", lambda c: _losses(c, "time")),
    ("from scratch s", "cost", lambda c: _from_scratch(c)),
    ("mJ / image", "energy", _number("energy_mj", ".2f")),
    ("model of energy / float", "operations", _number("modelled_energy_ratio", ".3f")),
    ("possible, achieved latency / float", "roofline", lambda c: _roofline(c)),
]


def _coverage(cells: dict[str, Any]) -> str | None:
    if "weights_covered" not in cells:
        return None
    return f"{100 * cells['weights_covered']:.0f} / {100 * cells['macs_covered']:.0f}"


def _losses(cells: dict[str, Any], equal: str) -> str | None:
    own, reference = cells.get(f"loss_at_equal_{equal}"), cells.get(f"float_loss_at_equal_{equal}")
    return None if own is None or reference is None else f"{own:.3g} / {reference:.3g}"


def _from_scratch(cells: dict[str, Any]) -> str | None:
    """Seconds to the row's accuracy; more than the longest training that there is, if none got there."""
    if cells.get("scratch_seconds") is None:
        return f"> {cells['scratch_seconds_tried']:.1f}" if "scratch_seconds_tried" in cells else None
    return f"{cells['scratch_seconds']:.1f}"


def _with_option(cells: dict[str, Any], option: str) -> dict[str, Any]:
    """The cells of a metric that was measured again with this option, under their own names."""
    return {key.partition("[")[0]: value for key, value in cells.items() if option in key.partition("[")[2]}


def _latency(cells: dict[str, Any]) -> str | None:
    """The paired ratio; for the float reference its own time."""
    if "latency_ratio" not in cells and "float_latency_ms" in cells:
        return f"1 ({cells['float_latency_ms']:.2f} ms)"
    return _interval("latency_ratio", ".2f")(cells)


def _throughput(cells: dict[str, Any]) -> str | None:
    return _number("images_per_second", ".1f")(cells) or _number("float_images_per_second", ".1f")(cells)


def _memory(cells: dict[str, Any]) -> str | None:
    mib = 1 / 2**20
    return _number("memory_bytes", ".0f", mib)(cells) or _number("float_memory_bytes", ".0f", mib)(cells)


def _roofline(cells: dict[str, Any]) -> str | None:
    if "roofline_ratio" not in cells:
        return None
    return f"{cells['roofline_ratio']:.2f}, {cells['roofline_achieved_ratio'].estimate:.2f}"


def _deployed(cells: dict[str, Any]) -> str | None:
    """The score of what a runtime executes, and which."""
    if "deployed_score" not in cells:
        return None
    return f"{100 * cells['deployed_score']:.2f} ({cells['deployed_runtime']}, {cells['deployed_sqnr_db']:.0f} dB)"


def publish(boards: list[Table], folder: Path, *, title: str, description: str = "") -> Path:
    """Write LEADERBOARD.md and leaderboard.csv into the folder; returns the path of the former."""
    page = folder / "LEADERBOARD.md"
    text = render(boards, title=title, description=description)
    write_atomically(page, lambda partial: partial.write_text(text, encoding="utf-8"))
    write_atomically(folder / "leaderboard.csv", lambda partial: frame(boards).to_csv(partial, index=False))
    return page


def render(boards: list[Table], *, title: str, description: str = "") -> str:
    """The whole page."""
    results = [r for board in boards for row in board.rows for r in row.results]
    machines = sorted({_machine(r) for r in results if r.status == "ok"})
    sections = [section(board, machines) for board in boards]
    parts = [f"# {title}", description, *sections, _origin(results, machines), _LEGEND]
    return "\n\n".join(part for part in parts if part) + "\n"


def section(board: Table, machines: Sequence[str] = ()) -> str:
    """The table of one model, its notes, and where the numbers come from: on which of several machines, too."""
    rows = board.rows
    shown = [c for c in COLUMNS if any(c[2](row.cells) is not None for row in rows)]
    extra = sorted({key for row in rows for key in row.cells if key.endswith(")")})
    notes: dict[str, int] = {}
    lines = [_line(row, board, shown, extra, notes) for row in rows]
    headers = ["#", "recipe", "W / A bits", _SCORE[board.task], "Δ to float [95 %]"]
    headers += [title for title, _, _ in shown] + extra + ["status"]
    if len(machines) > 1:
        headers.append("machine")
        lines = [[*line, _numbers(row, machines)] for line, row in zip(lines, rows, strict=True)]
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    absent = _absent(rows, {metric for _, metric, _ in shown})
    below = [f"<sup>{number}</sup> {text}" for text, number in notes.items()] + absent + _alarms(rows)
    return "\n\n".join([f"## {board.dataset} · {board.model}", table, "  \n".join(below), _provenance(board)])


def _line(
    row: Row, board: Table, shown: list[tuple[str, str, Cell]], extra: list[str], notes: dict[str, int]
) -> list[str]:
    name = row.recipe if len(row.results) == 1 else f"{row.recipe} ({len(row.results)} seeds)"
    name += f" ({row.cells['toolkit']})" if "toolkit" in row.cells else ""
    score = NOT_MEASURED if row.score is None else f"{100 * row.score:.2f}"
    score += f" [{100 * row.spread.low:.2f}, {100 * row.spread.high:.2f}]" if row.spread else ""
    reference = board.reference is row
    name += " (reference)" if reference else " ⚠" if row.alarms or row.warnings else ""
    line = [row.rank, name, _bits(row), score, _drop(row.drop)]
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
    if row.outside:
        status = f"outside <sup>{notes.setdefault(f'{row.recipe}: {row.outside[0]}', len(notes) + 1)}</sup>"
    elif status != "ok":
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


def _alarms(rows: list[Row]) -> list[str]:
    """One line for each pair of rows in the wrong order, and for each other warning."""
    lines = []
    for row in rows:
        lines += [f"⚠ {row.recipe}: {warning}" for warning in row.warnings]
        for alarm in row.alarms:
            worse, better = (f"{r.recipe} ({100 * (r.score or 0):.2f})" for r in (row, alarm.other))
            d = alarm.difference
            by = f"{-100 * d.estimate:.2f} [{-100 * d.high:.2f}, {-100 * d.low:.2f}]"
            lines.append(f"⚠ {alarm.how}, worse: {worse} is below {better} by {by}")
    return lines


def _absent(rows: list[Row], shown: set[str]) -> list[str]:
    """One line for each metric that no row has."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for metric, reason in row.notes.items():
            if metric.partition("[")[0] not in shown and reason not in reasons.setdefault(metric, []):
                reasons[metric].append(reason)
    return [f"{metric}: {'; '.join(texts)}" for metric, texts in reasons.items()]


def _provenance(board: Table) -> str:
    """What all rows have in common."""
    results = [r for row in board.rows for r in row.results]
    first = next((r for r in results if r.status == "ok"), results[0])
    (dataset, _, data_hash), (model, _, weights) = first.identity["dataset"], first.identity["model"]
    manifest = first.identity["calibration"][2]
    scored = first.scoring.get("images")
    unreadable = len(first.scoring.get("unreadable", []))
    skipped = f" ({unreadable} unreadable ones skipped)" if unreadable else ""
    return (
        f"model {model}, weights `{weights}`; data {dataset} `{data_hash}`, {scored} images scored{skipped}; "
        f"calibration: {board.calibration}, manifest `{manifest}`"
    )


def _numbers(row: Row, machines: Sequence[str]) -> str:
    """By which the list below the tables calls the machines of a row."""
    used = {_machine(r) for r in row.results if r.status == "ok"}
    return ", ".join(str(number) for number, machine in enumerate(machines, 1) if machine in used)


def _origin(results: list[Result], machines: Sequence[str]) -> str:
    """Machines, software and days of all results."""
    made = sorted(r.started[:10] for r in results)
    several = len(machines) > 1
    lines = [f"machine{f' {number}' if several else ''}: {name}" for number, name in enumerate(machines, 1)]
    lines += sorted({f"software: {_versions(r)}" for r in results if r.status == "ok"})
    days = f"measured {made[0]}" + (f" to {made[-1]}" if made[-1] != made[0] else "") if made else "nothing measured"
    return "  \n".join([*lines, days])


def _machine(result: Result) -> str:
    p = result.provenance
    parts = [
        p.get("cpu"),
        f"{p['cores']} cores" if "cores" in p else None,
        " ".join(p.get("cpu_flags", [])),
        " ".join(f"{name}={value}" for name, value in p.get("cpu_limits", {}).items()),
        p.get("gpu"),
    ]
    return ", ".join(part for part in parts if part)


def _versions(result: Result) -> str:
    packages: dict[str, str] = result.provenance.get("packages", {})
    return ", ".join(f"{name} {version}" for name, version in packages.items())


_LEGEND = (
    "Every row was scored on its packed file, loaded back. Bits are averages over what was quantized, size is that of "
    "the file, coverage the share of weights and of multiply-accumulates that were quantized. Δ is paired over the "
    "same images. The rank is one more than the number of recipes that are significantly better, at 95 %. Latency is "
    "that of integer kernels in a real runtime, interleaved with the float network of the same runtime."
)


def frame(boards: Iterable[Table]) -> pd.DataFrame:
    """One line for each row of each table, numbers unrounded."""
    return pd.DataFrame([_record(board, row) for board in boards for row in board.rows])


def _record(board: Table, row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {
        "dataset": board.dataset,
        "model": board.model,
        "calibration": board.calibration,
        "recipe": row.recipe,
        "seeds": len(row.results),
        "rank": row.rank,
        "status": row.status,
        "score": row.score,
        "alarm": "; ".join([*(f"{a.how}, worse than {a.other.recipe}" for a in row.alarms), *row.warnings]),
    }
    for name, value in {"difference": row.drop, "spread": row.spread, **row.cells}.items():
        if isinstance(value, Interval):
            record |= {name: value.estimate, f"{name}_low": value.low, f"{name}_high": value.high}
        elif value is not None:
            record[name] = value
    record |= {f"{name}_note": reason for name, reason in row.notes.items()}
    machines = sorted({_machine(r) for r in row.results if r.status == "ok"})
    return record | {"machine": "; ".join(machines), "key": row.key, "weights": row.results[0].identity["model"][2]}
