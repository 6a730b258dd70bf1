"""The conformance kit: does a method keep the promises that every method makes? Run by `qbench check PLUGIN`."""

from __future__ import annotations

import dataclasses
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from qbench import registry
from qbench.datasets.base import Split
from qbench.errors import Unsupported, UserError
from qbench.quant import packing
from qbench.quant.audit import audit
from qbench.quant.checkpoints import Checkpoints
from qbench.quant.layers import encodings
from qbench.registry import Reference
from qbench.workspace import Workspace, differences

MODELS = ("digits_resnet", "digits_vit")
"""A convolutional network and a transformer, small enough to quantize in a second."""
_IMAGES = 64
_SAME_FUNCTION = 1e-5  # of the largest output: what re-ordered float32 sums may differ by


@dataclass(frozen=True)
class Check:
    """One promise: whether it is kept, and if not (or if it could not be checked), why."""

    name: str
    ok: bool
    detail: str = ""


def check_method(reference: Reference, models: tuple[str, ...] = MODELS, device: str = "cpu") -> Iterator[Check]:
    """Run a method on toy models, and check what it returns.

    Args:
        reference: the method with its options.
        models: model plugins for the `digits` dataset.
        device: where the method runs, as torch names it.

    Yields:
        one `Check` for each promise and model; a model that the method does not support passes, and says so.
    """
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            for found in _Toy(reference, name, Path(folder), torch.device(device)).checks():
                yield dataclasses.replace(found, name=f"{name}: {found.name}")


class _StoppedError(Exception):
    """Raised in the middle of a training."""


class _Toy:
    """One method on one toy model."""

    def __init__(self, reference: Reference, model: str, folder: Path, device: torch.device) -> None:
        self.reference, self.folder, self.device = reference, folder, device
        self.track = reference.plugin.attributes["track"]
        self.model = registry.resolve("model", model)
        self.looked_at: list[str] = []
        digits = registry.resolve("dataset", "digits")
        self.space = Workspace(digits, self.model, (_IMAGES, 0), folder / "cache", device)
        watched = dataclasses.replace(self.space.dataset, evaluation=self._watched(self.space.dataset.evaluation))
        self.space.__dict__["dataset"] = watched
        self.float = _frozen(self.space.model.load().to(device))
        self.images = self.space.data(seed=0, trains=False).calibration.first(8).source.batch(range(8)).to(device)
        self.answers = _answers(self.float, self.images)

    def _watched(self, split: Split) -> Split:
        def load(position: int) -> Image:
            self.looked_at.append(split.ids[position])
            return split.load(position)

        return dataclasses.replace(split, load=load)

    def checks(self) -> Iterator[Check]:
        try:
            model, seen = self._quantize()
        except Unsupported as error:
            yield Check("supported", True, f"unsupported: {error}")
            return
        except Exception as error:
            yield Check("runs", False, _place(error))
            return
        yield Check("runs", True)
        yield self._returned(model)
        if not isinstance(model, nn.Module):
            return
        yield from self._same_output(model)
        yield self._untouched(seen)
        yield self._deterministic(model)
        if self.track == "qat":
            yield self._goes_on(model)
        yield self._levels(model)
        yield self._codes(model)
        yield from self._artifact(model)

    def _quantize(self, **fields: Any) -> tuple[nn.Module, nn.Module]:
        """What the method returns, and the float network that it was shown."""
        seen = _frozen(self.space.model.load().to(self.device))
        data = self.space.data(seed=0, trains=self.track == "qat", reference=seen, **fields)
        torch.manual_seed(0)
        return self.reference(self.space.model.load().to(self.device), data), seen

    def _returned(self, model: object) -> Check:
        kind = type(model).__name__
        return Check("returns a module", isinstance(model, nn.Module), "" if isinstance(model, nn.Module) else kind)

    def _same_output(self, model: nn.Module) -> Iterator[Check]:
        try:
            answers = _answers(model, self.images)
        except Exception as error:
            yield Check("same output shape and type", False, _place(error))
            return
        was, now = _signature(self.answers), _signature(answers)
        yield Check("same output shape and type", was == now, "" if was == now else f"{now} instead of {was}")
        if was != now:
            return
        finite = bool(answers.isfinite().all())
        yield Check("finite output", finite, "" if finite else "NaN or infinite")
        if self.track == "structure":
            apart = float((answers - self.answers).abs().max() / self.answers.abs().max())
            same = apart <= _SAME_FUNCTION
            yield Check("keeps the float function", same, "" if same else f"{apart:.1e} of the largest output apart")

    def _untouched(self, seen: nn.Module) -> Check:
        changed = differences(seen, self.float)
        if changed:
            return Check("only its model is changed", False, f"data.reference was changed: {', '.join(changed[:3])}")
        if self.looked_at:
            return Check("only its model is changed", False, f"looked at evaluation image {self.looked_at[0]}")
        return Check("only its model is changed", True)

    def _deterministic(self, model: nn.Module) -> Check:
        try:
            changed = differences(model, self._quantize()[0])
        except Exception as error:
            return Check("deterministic under a seed", False, f"the second run fails: {_place(error)}")
        return Check("deterministic under a seed", not changed, f"differ: {', '.join(changed[:3])}" if changed else "")

    def _goes_on(self, model: nn.Module) -> Check:
        """Stop it in the middle of its training, and start it again."""
        name, folder = "goes on to the same weights after a stop", self.folder / "checkpoints"

        def stop(done: float) -> None:
            if done >= 0.5:
                raise _StoppedError

        with suppress(_StoppedError):
            self._quantize(checkpoints=Checkpoints(folder, every=0), progress=stop)
        try:
            again, _ = self._quantize(checkpoints=Checkpoints(folder, every=0))
        except Exception as error:
            return Check(name, False, _place(error))
        changed = differences(model, again)
        return Check(name, not changed, f"differ: {', '.join(changed[:3])}" if changed else "")

    def _levels(self, model: nn.Module) -> Check:
        claims = audit(model).items()
        false = [
            f"{name} uses {claim['used']} of {claim['levels']}"
            for name, claim in claims
            if claim["used"] > claim["levels"]
        ]
        return Check("claimed levels are true", not false, ", ".join(false[:3]))

    def _codes(self, model: nn.Module) -> Check:
        state = model.state_dict()
        attached = encodings(model).items()
        changed = [name for name, code in attached if not torch.equal(code.decode().to(state[name]), state[name])]
        detail = f"changed after they were encoded: {', '.join(changed[:3])}" if changed else ""
        return Check("weights are what their codes say", not changed, detail)

    def _artifact(self, model: nn.Module) -> Iterator[Check]:
        path = self.folder / "artifact.safetensors"
        origin = packing.Origin(self.model.name, dict(self.model.options))
        try:
            packing.pack(model, path, origin, self.float.state_dict())
            loaded = packing.load(path).to(self.device)
        except Exception as error:
            yield Check("packs and loads back", False, _place(error))
            return
        changed = differences(model, loaded)
        yield Check("packs and loads back", not changed, f"differ: {', '.join(changed[:3])}" if changed else "")
        if not changed:
            same = torch.equal(_answers(model, self.images), _answers(loaded, self.images))
            yield Check("answers the same when loaded back", same)


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        answers: Tensor = model.eval()(images)
    return answers


def _signature(answers: object) -> str:
    return f"{answers.dtype} {tuple(answers.shape)}" if isinstance(answers, Tensor) else type(answers).__name__


def _place(error: Exception) -> str:
    """The error, and the line of code that raised it."""
    if isinstance(error, UserError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
