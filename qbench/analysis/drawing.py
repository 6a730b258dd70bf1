"""What everything that draws into a folder needs: the extra `analyze`, and the folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from qbench.errors import UserError


def check_installed(what: str) -> None:
    """Before anything is measured.

    Raises:
        UserError: matplotlib or plotly is missing.
    """
    for name in ("matplotlib", "plotly"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{what} need {name}: pip install 'qbench[analyze]', or leave out -o")


def make(folder: Path) -> None:
    """Make the folder if it is not there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); choose another folder with -o") from error
