"""Results of runs that ended well, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from qbench.run import Measurement, Result


def ended(**fields: Any) -> Result:
    """The result of a run, but for the fields that are given."""
    given = {"key": "0123456789ab", "label": "a/b/rtn/seed=0", "recipe": "rtn", "started": "2026-01-01T00:00:00+00:00"}
    return Result(**{**given, "identity": {}, "status": "ok", "phase": "done", **fields})


def measured(**values: Any) -> Measurement:
    """What a metric left."""
    return Measurement(status="ok", unit="", direction="lower", values=values)
