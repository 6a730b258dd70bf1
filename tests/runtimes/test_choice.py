"""The fastest runtime that really runs the network on integers, and a word about each of the others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qbench import registry
from qbench.errors import Unsupported, UserError
from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, weight_of
from qbench.registry import Plugin
from qbench.runtimes import choice
from qbench.runtimes.base import Compiled
from qbench.runtimes.choice import RuntimeChoice, candidates, choose


class _Made:
    """A runtime that sleeps, or refuses."""

    device: Literal["cpu", "cuda"] = "cpu"

    def __init__(self, seconds: float | None, layers: int = 10) -> None:
        self.seconds, self.layers = seconds, layers

    def compile(self, module: nn.Module, example: Tensor, *, threads: int) -> Compiled:
        if self.seconds is None:
            raise Unsupported("this machine is not made for it")

        def run(batch: np.ndarray) -> list[np.ndarray]:
            time.sleep(self.seconds or 0)
            return [batch]

        return Compiled(run, self.layers, 12, ("0",), {})


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> dict[str, float | None]:
    """The only runtimes there are, and the seconds that a call takes; None refuses."""
    known: dict[str, float | None] = {"slow": 0.006, "fast": 0.002, "none": None}

    def engines(runtime: str) -> Mapping[str, Any]:
        return {name: _Made(seconds) for name, seconds in known.items() if runtime in (name, "auto")}

    monkeypatch.setattr(choice, "engines", engines)
    return known


def test_the_fastest_is_taken_and_the_choice_explained(runtimes: object) -> None:
    chosen = choose("auto", nn.Linear(2, 2), torch.zeros(1, 2), 1)
    assert chosen.taken.name == "fast"
    assert chosen.considered["none"] == {"reason": "this machine is not made for it"}
    for name in ("slow", "fast"):
        found = chosen.considered[name]
        assert (found["integer_layers"], found["layers"]) == (10, 12)
        assert len(found["seconds"]) == 15
    assert np.median(chosen.considered["fast"]["seconds"]) < np.median(chosen.considered["slow"]["seconds"])


def test_one_that_leaves_layers_in_float_is_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"whole": _Made(0.004), "nearly": _Made(0.002, 9), "hardly": _Made(0.0, 8)}
    monkeypatch.setattr(choice, "engines", lambda _: made)
    assert choose("auto", nn.Linear(2, 2), torch.zeros(1, 2), 1).taken.name == "nearly"


def test_one_that_is_asked_for_is_taken_without_a_race(runtimes: object) -> None:
    chosen = choose("slow", nn.Linear(2, 2), torch.zeros(1, 2), 1)
    assert chosen.taken.name == "slow"
    assert chosen.considered == {"slow": {"integer_layers": 10, "layers": 12}}
    with pytest.raises(Unsupported, match=r"^this machine is not made for it$"):
        choose("none", nn.Linear(2, 2), torch.zeros(1, 2), 1)


def test_where_none_can_each_says_why(runtimes: dict[str, float | None]) -> None:
    runtimes |= dict.fromkeys(runtimes)
    with pytest.raises(Unsupported) as caught:
        choose("auto", nn.Linear(2, 2), torch.zeros(1, 2), 1)
    assert str(caught.value) == "; ".join(f"{name}: this machine is not made for it" for name in runtimes)


def test_what_no_runtime_can_is_said_once() -> None:
    model = nn.Linear(2, 2)
    encode(model, Affine.nearest(weight_of(model), 0.01, bits=8))
    with pytest.raises(Unsupported, match=r"^not deployable as integers: no input quantizers: weights only$"):
        candidates("auto", model, torch.zeros(1, 2), 1)


def test_integers_go_where_integer_kernels_are() -> None:
    pytest.importorskip("openvino")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, 4)).eval()
    for layer in (model[0], model[2]):
        encode(layer, Affine.nearest(weight_of(layer), 0.01, bits=7))
        quantize_input(layer, StaticQuantizer(8, False, 2.0**-6, 128))
    able, unable = candidates("auto", model, torch.rand(1, 3, 4, 4), 1)
    assert "openvino" in [candidate.name for candidate in able]
    assert "PyTorch has an integer kernel for none of the 2" in unable["torch"]


def test_references_are_checked_where_they_are_written() -> None:
    from pydantic import TypeAdapter

    adapter = TypeAdapter(RuntimeChoice)
    assert adapter.validate_python("auto") == "auto"
    assert adapter.validate_python("torch[compile=true]") == "torch[compile=true]"
    with pytest.raises(UserError, match="unknown runtime 'openvno'; did you mean 'openvino'"):
        adapter.validate_python("openvno")


def test_every_runtime_takes_part() -> None:
    assert set(choice.engines("auto")) == set(registry.index("runtime"))
    assert all(isinstance(plugin, Plugin) for plugin in registry.index("runtime").values())
