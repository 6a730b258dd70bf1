"""One run, phase by phase: load, quantize, pack, reload, score, measure. Runs in a process of its own."""

from __future__ import annotations

import copy
import dataclasses
import math
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qbench import registry
from qbench.devices import best_device
from qbench.errors import Unsupported, UserError
from qbench.machine import machine
from qbench.metrics.ap import match
from qbench.metrics.base import Finished
from qbench.quant import activations, packing
from qbench.quant.checkpoints import Checkpoints
from qbench.quant.layers import encodings
from qbench.quant.packing import Origin, Sizes
from qbench.quant.paging import limit_memory
from qbench.registry import Reference
from qbench.run import Measurement, Phase, Result, Run, Status, engine, restore
from qbench.score import agree, score
from qbench.store import Store
from qbench.workspace import Workspace, differences, images_used

Emit = Callable[..., None]
"""Called with the fields of an event: `phase=...`, `metric=...` or `fraction=...`."""


def work(job: dict[str, Any], emit: Emit) -> None:
    """Do one job of the runner: the whole run, or further metrics of a finished one. Writes the result."""
    torch.set_num_threads(job["threads"])
    limit_memory(job["memory"], 1 / job["jobs"])
    for path in job["plugins"]:
        registry.load_file(path)
    registry.load_entry_points()
    worker = Worker(job, emit)
    if job["quantize"]:
        worker.quantize_and_score()
    else:
        worker.resume()
    worker.measure({key: registry.resolve("metric", *metric) for key, metric in job["metrics"].items()})


class Worker:
    """The state of one job."""

    def __init__(self, job: dict[str, Any], emit: Emit) -> None:
        self.emit = emit
        self.run: Run = restore(job["identity"])
        self.plugins = tuple(job["plugins"])
        self.store = Store(Path(job["results"]))
        self.cache = Path(job["cache"])
        self.threads: int = job["threads"]
        self.artifact = self.cache / "artifacts" / f"{job['id']}.safetensors"
        self.artifact.parent.mkdir(parents=True, exist_ok=True)
        # Of another engine's training nothing can be taken up.
        self.checkpoints = self.cache / "checkpoints" / f"{job['id']}-{engine()}"
        self.device = best_device()
        self.result = Result(
            key=job["id"],
            label=job["label"],
            identity=self.run.identity,
            recipe=job["recipe"],
            status="ok",
            phase="start",
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.outcomes: dict[str, np.ndarray] = {}

    @contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        self.emit(phase=name)
        self.result.phase = name
        begin = time.perf_counter()
        yield
        self.result.seconds[name] = time.perf_counter() - begin

    # ---------------------------------------------------------------------------------------------- the run itself

    def quantize_and_score(self) -> None:
        """All phases up to the score; whatever goes wrong becomes the result's status."""
        try:
            self._run()
        except Exception as error:
            self.result.status, self.result.error = classify(error), f"{describe(error)}"
            self.result.traceback = traceback.format_exc()
            traceback.print_exc()
        self.store.write(self.result, self.outcomes if self.result.status == "ok" else None)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _run(self) -> None:
        with self._phase("load"):
            self.result.provenance = {
                **machine(),
                "engine": engine(),
                "threads": self.threads,
                "device": str(self.device),
            }
            space = self._workspace()
            self.result.task = space.model.task
            model = space.model.load().to(self.device)
        with self._phase("quantize"):
            model, reference = self._quantize(space, model)
        with self._phase("pack"):
            origin = Origin(self.run.model.name, dict(self.run.model.options), self.plugins)
            sizes = packing.pack(model, self.artifact, origin, reference.state_dict())
            self.result.artifact = dataclasses.asdict(sizes) | {"float_bytes": self._float_bytes(space, origin, sizes)}
        with self._phase("reload"):
            loaded = self._reload(model)
            images = space.images("evaluation")
            self.result.artifact["reloaded"] = agree(model, loaded, images, min(64, len(images)))
            if not self.result.artifact["reloaded"]["equal"]:
                raise ValueError(f"the reloaded model answers differently: {self.result.artifact['reloaded']}")
            del model
        with self._phase("score"):
            self.result.bits = bits(loaded)
            outcomes, notes = score(loaded, space.model, images, device=self.device, threads=self.threads)
            if space.model.task == "detection":
                outcomes |= match(outcomes, images.split.targets, len(space.dataset.classes)).to_arrays()
            self.outcomes, self.result.scoring = outcomes, notes

    def _workspace(self) -> Workspace:
        return Workspace(self.run.dataset, self.run.model, self.run.calibration, self.cache, self.device)

    def _quantize(self, space: Workspace, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The quantized model, and the float network it is to be compared with layer by layer."""
        begin = time.perf_counter()
        reference: nn.Module | None = None
        used, saved = 0, 0.0
        for position, step in enumerate(self.run.recipe):
            track = step.plugin.attributes["track"]
            checkpoints = Checkpoints(self.checkpoints / str(position))
            if reference is None and track != "structure":
                reference = frozen(model)
            data = space.data(
                seed=self.run.seed,
                trains=track == "qat",
                reference=reference,
                checkpoints=checkpoints,
                progress=lambda done: self.emit(fraction=done),
                record=self.result.records.__setitem__,
            )
            torch.manual_seed(self.run.seed)
            model = check_module(step, step.plugin(model, data, **step.options))
            used = max(used, images_used(data))
            saved += data.shared.seconds + checkpoints.seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        # What an earlier run has computed is a cost of this one all the same.
        seconds = time.perf_counter() - begin + saved
        self.result.records["cost"] = {"seconds": seconds, "peak_memory_bytes": peak, "images": used}
        return model, reference if reference is not None else frozen(model)

    def _float_bytes(self, space: Workspace, origin: Origin, sizes: Sizes) -> int:
        """Bytes of the float model's own artifact."""
        if self.run.is_reference:
            return sizes.file_bytes
        scratch = self.artifact.with_suffix(".float")
        try:
            return packing.pack(space.model.load(), scratch, origin).file_bytes
        finally:
            scratch.unlink(missing_ok=True)

    def _reload(self, model: nn.Module) -> nn.Module:
        try:
            loaded = packing.load(self.artifact).to(self.device)
        except RuntimeError as error:
            raise ValueError(
                "the artifact does not load back: the method changed the structure of the network other than through "
                f"qbench.quant.structure operations ({str(error).splitlines()[0]})"
            ) from error
        changed = differences(model, loaded)
        if changed:
            raise ValueError(f"these tensors changed between memory and file: {', '.join(changed[:5])}")
        return loaded

    # ---------------------------------------------------------------------------------------------- metrics

    def resume(self) -> None:
        """Take up a run that was scored by another process."""
        known = self.store.read(self.result.key)
        assert known is not None, "the runner measures only what was scored"
        self.result, self.outcomes = known, self.store.outcomes(known.key)

    def measure(self, metrics: dict[str, Reference]) -> None:
        """Measure, and write the result after each metric, so that a crash in one keeps the others."""
        if self.result.status != "ok":
            return
        finished: Finished | None = None
        for key, reference in metrics.items():
            self.emit(phase="measure", metric=key)
            finished = finished or self._finished()
            self.result.metrics[key] = self._measurement(reference, finished)
            arrays = self.result.metrics[key].values.pop("outcomes", {})
            self.outcomes |= {f"{key}/{name}": array for name, array in arrays.items()}
            self.result.phase = "done"
            self.store.write(self.result, self.outcomes if arrays else None)

    def _finished(self) -> Finished:
        space = self._workspace()
        images = space.images("evaluation")
        fields = {field.name for field in dataclasses.fields(Sizes)}
        return Finished(
            model=space.model,
            quantized=packing.load(self.artifact).to(self.device),
            load_float=lambda: space.model.load().to(self.device),
            artifact=self.artifact,
            sizes=Sizes(**{key: value for key, value in self.result.artifact.items() if key in fields}),
            float_bytes=self.result.artifact["float_bytes"],
            dataset=dataclasses.replace(space.dataset, evaluation=images.split),
            images=images,
            outcomes=self.outcomes,
            data=space.data(seed=self.run.seed, trains=False),
            cost=self.result.records.get("cost", {}),
            records=self.result.records,
            threads=self.threads,
            cache=self.cache,
        )

    def _measurement(self, reference: Reference, finished: Finished) -> Measurement:
        attributes = reference.plugin.attributes
        outcome: dict[str, Any] = {"unit": attributes["unit"], "direction": attributes["direction"]}
        begin = time.perf_counter()
        try:
            values = reference.plugin(finished, **reference.options)
            return Measurement(status="ok", values=values, seconds=time.perf_counter() - begin, **outcome)
        except Exception as error:
            status = classify(error)
            trace = None if status == "unsupported" else traceback.format_exc()
            return Measurement(status=status, error=describe(error), traceback=trace, **outcome)


def frozen(model: nn.Module) -> nn.Module:
    """A copy that nobody trains."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def check_module(step: Reference, returned: Any) -> nn.Module:
    """What a method returned, in evaluation mode.

    Raises:
        TypeError: it is not a module.
    """
    if not isinstance(returned, nn.Module):
        raise TypeError(f"method {step.name!r} returned {type(returned).__name__}, not a torch.nn.Module")
    return returned.eval()


def bits(model: nn.Module) -> dict[str, float | None]:
    """Average bits of the encoded weights, and of the quantized inputs; None where nothing is quantized."""
    attached = encodings(model).values()
    numbers = sum(encoding.decode().numel() for encoding in attached)
    widths = [math.log2(q.levels) for q in activations.input_quantizers(model).values() if isinstance(q.levels, int)]
    return {
        "weights": sum(encoding.nominal_bits for encoding in attached) / numbers if numbers else None,
        "activations": sum(widths) / len(widths) if widths else None,
    }


def classify(error: Exception) -> Status:
    """The status that an exception means."""
    if isinstance(error, Unsupported):
        return "unsupported"
    exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
    return "oom" if exhausted else "error"


def describe(error: Exception) -> str:
    return str(error) if isinstance(error, (Unsupported, UserError)) else f"{type(error).__name__}: {error}"
