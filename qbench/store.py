"""Results on disk: one JSON file and one npz file (outcomes per image) for each run, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from qbench.errors import UserError
from qbench.run import Result


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place, flushed to disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Store:
    """A folder of results. Stores merge by copying files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check_writable(self) -> None:
        """Look whether the folder can be made and written to, without doing so.

        Raises:
            UserError: it cannot.
        """
        nearest = self.folder
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"results folder {self.folder} is not writable (because of {nearest}); use --results")

    def tidy(self) -> list[str]:
        """Remove what writers that were killed left behind, and set damaged results aside; one line for each of these.

        For the only writer: see `qbench.runner.locked`.
        """
        for partial in self.folder.glob(".*.*.[0-9]*"):
            partial.unlink(missing_ok=True)
        return self._set_aside_damaged()

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def outcomes_path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def write(self, result: Result, outcomes: Mapping[str, np.ndarray] | None = None) -> None:
        """Outcomes first: a result that is there has its outcomes."""
        if outcomes is not None:
            write_atomically(self.outcomes_path(result.key), lambda partial: _save(partial, outcomes))
        text = result.model_dump_json(indent=1)
        write_atomically(self.path(result.key), lambda partial: partial.write_text(text))

    def read(self, key: str) -> Result | None:
        """The result of that key, None if there is none.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            return Result.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise UserError(f"{path} is damaged ({first}); run the suite again to replace it") from None

    def outcomes(self, key: str) -> dict[str, np.ndarray]:
        with np.load(self.outcomes_path(key), allow_pickle=False) as arrays:
            return dict(arrays)

    def read_all(self) -> tuple[dict[str, Result], list[str]]:
        """Every readable result by key, and one line for each file that is damaged."""
        results: dict[str, Result] = {}
        damaged = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                result = self.read(path.stem)
            except UserError as error:
                damaged.append(str(error))
            else:
                if result is not None:
                    results[path.stem] = result
        return results, damaged

    def _set_aside_damaged(self) -> list[str]:
        """Rename damaged results to `*.damaged`, so that their runs are done again."""
        lines = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                result = self.read(path.stem)
                if result is not None and result.status == "ok":
                    self.outcomes(path.stem)
            except (UserError, OSError, ValueError, EOFError) as error:
                path.rename(path.with_suffix(".json.damaged"))
                lines.append(f"{error}; set aside as {path.name}.damaged")
        return lines


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def find(results: Path, prefix: str) -> tuple[Store, str]:
    """The store and key of a result whose key begins with `prefix`, anywhere under the results folder.

    Raises:
        UserError: none, or more than one.
    """
    found = sorted(path for path in results.rglob(f"{prefix}*.json") if len(path.stem) == 12)
    if len(found) != 1:
        names = ", ".join(path.stem for path in found[:5])
        what = f"matches {len(found)} results ({names})" if found else f"matches no result under {results}"
        raise UserError(f"key {prefix!r} {what}; `qbench status SUITE` lists the keys")
    return Store(found[0].parent), found[0].stem
