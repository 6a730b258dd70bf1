"""A run: one cell of a suite's matrix, its identity, and what it leaves."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from qbench import registry
from qbench.registry import Reference

SCHEMA = 1
Phase = Literal["start", "load", "quantize", "pack", "reload", "score", "measure", "done"]
Status = Literal["ok", "error", "timeout", "oom", "crashed", "unsupported"]


@dataclass(frozen=True)
class Run:
    """One model, quantized by one recipe under one seed, and scored on one dataset."""

    dataset: Reference
    dataset_fingerprint: str
    model: Reference
    weights: str
    """Hash of the float weights."""
    recipe: tuple[Reference, ...]
    seed: int
    calibration: tuple[int, int]
    """How many images, and the seed they are drawn with."""
    manifest: str
    """Hash of the calibration images' ids."""
    title: str = ""
    """What boards call the model; its reference unless the plugin names it."""

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.dataset}/{self.title or self.model}/{recipe_label(self.recipe)}/seed={self.seed}"

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        references = (self.dataset, self.model, *self.recipe)
        plugins = {f"{p.kind} {p.name}": p.fingerprint for r in references for p in r.plugins}
        return {
            "schema": SCHEMA,
            "dataset": [self.dataset.name, dict(self.dataset.options), self.dataset_fingerprint],
            "model": [self.model.name, dict(self.model.options), self.weights],
            "recipe": [[step.name, dict(step.options)] for step in self.recipe],
            "seed": self.seed,
            "calibration": [*self.calibration, self.manifest],
            "sources": plugins | {f"file {path}": hash for step in self.recipe for path, hash in step.files.items()},
        }

    @functools.cached_property
    def key(self) -> str:
        """Twelve hexadecimal digits that identify the run."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def is_reference(self) -> bool:
        """Whether it is the float run that the others are compared with."""
        return [step.name for step in self.recipe] == ["fp32"]


def recipe_label(recipe: tuple[Reference, ...]) -> str:
    return " + ".join(map(str, recipe))


def restore(identity: Mapping[str, Any]) -> Run:
    """The run of an identity: what a worker process is sent.

    Raises:
        UserError: a plugin it names is not known here.
    """
    (dataset, d_options, d_hash), (model, m_options, weights) = identity["dataset"], identity["model"]
    images, seed, manifest = identity["calibration"]
    return Run(
        dataset=registry.resolve("dataset", dataset, d_options),
        dataset_fingerprint=d_hash,
        model=registry.resolve("model", model, m_options),
        weights=weights,
        recipe=tuple(registry.resolve("method", name, options) for name, options in identity["recipe"]),
        seed=identity["seed"],
        calibration=(images, seed),
        manifest=manifest,
    )


_ENGINE = (
    "data.py",
    "score.py",
    "worker.py",
    "quant/*.py",
    "analysis/*.py",
    "datasets/*.py",
    "models/base.py",
    "metrics/*.py",
    "runtimes/*.py",
    "toolkits/*.py",
)


@functools.cache
def engine() -> str:
    """Hash of the source that every result passes through, whatever its plugins: results of another one are stale."""
    folder = Path(__file__).parent
    sources = sorted(path for pattern in _ENGINE for path in folder.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


class Measurement(BaseModel):
    """What one metric left: raw values, or the reason why there are none."""

    model_config = ConfigDict(extra="forbid")

    status: Status
    unit: str
    direction: Literal["higher", "lower", "none"]
    values: dict[str, Any] = {}
    error: str | None = None
    traceback: str | None = None
    seconds: float | None = None


class Result(BaseModel):
    """What one run left: one JSON file. Raw samples and provenance, no averages."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    key: str
    label: str
    identity: dict[str, Any]
    recipe: str
    """As boards show it."""
    status: Status
    phase: Phase
    error: str | None = None
    traceback: str | None = None
    started: str
    """ISO 8601, UTC."""
    seconds: dict[str, float] = {}
    """Of each phase."""
    task: Literal["classification", "detection"] | None = None
    bits: dict[str, float | None] = {}
    """Average bits of quantized `weights` and `activations`; None where they stay float."""
    artifact: dict[str, Any] = {}
    """Sizes, hash and the proof that the reloaded model equals the one in memory."""
    scoring: dict[str, Any] = {}
    records: dict[str, Any] = {}
    metrics: dict[str, Measurement] = {}
    provenance: dict[str, Any] = {}
