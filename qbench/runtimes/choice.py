"""Which runtime executes a network here, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator
from torch import Tensor, nn

from qbench import registry
from qbench.errors import Unsupported
from qbench.runtimes.base import Compiled, Runtime
from qbench.runtimes.integers import is_quantized, judge
from qbench.runtimes.timing import interleave

AUTO = "auto"
_NEARLY_ALL = 0.9
RuntimeChoice = Annotated[
    str, AfterValidator(lambda text: text if text == AUTO else str(registry.resolve("runtime", *registry.parse(text))))
]
"""Option type: a runtime, as `name[option=value]`, or `auto`."""


@dataclass(frozen=True)
class Candidate:
    """A runtime, and the network compiled by it."""

    name: str
    engine: Runtime
    compiled: Compiled


@dataclass(frozen=True)
class Choice:
    """The runtime to take, and what can be said of each one that was considered."""

    taken: Candidate
    considered: dict[str, dict[str, Any]]
    """By name: how many layers ran on integers, and the seconds of a few calls; or the `reason` why it cannot."""


def choose(runtime: str, network: nn.Module, example: Tensor, threads: int) -> Choice:
    """The runtime of that name; of all, for `auto`, the one with the least median time of a few calls.

    One that leaves many layers in float, which another runs on integers, does not run the same thing and is not taken.

    Args:
        runtime: a reference, or `auto`.
        network: with encodings and input quantizers, or float.
        example: a batch (B, C, H, W).
        threads: that the runtime may use.

    Raises:
        Unsupported: none can run the network, or only as a simulation.
    """
    able, unable = candidates(runtime, network, example, threads)
    considered: dict[str, dict[str, Any]] = {name: {"reason": reason} for name, reason in unable.items()}
    for candidate in able:
        compiled = candidate.compiled
        considered[candidate.name] = {"integer_layers": compiled.integer_layers, "layers": compiled.compute_layers}
    if len(able) == 1:
        return Choice(able[0], considered)
    batch = np.ascontiguousarray(example.cpu().numpy())
    calls = {candidate.name: partial(candidate.compiled.run, batch) for candidate in able}
    _, times = interleave(calls, samples=15, warmup=2, seconds=3.0)
    for name, seconds in times.items():
        considered[name]["seconds"] = seconds
    most = max(candidate.compiled.integer_layers for candidate in able)
    whole = [candidate for candidate in able if candidate.compiled.integer_layers >= _NEARLY_ALL * most]
    return Choice(min(whole, key=lambda candidate: float(np.median(times[candidate.name]))), considered)


def candidates(
    runtime: str, network: nn.Module, example: Tensor, threads: int
) -> tuple[list[Candidate], dict[str, str]]:
    """The network compiled by the runtime of that name, or by all for `auto`; and why others cannot.

    Raises:
        Unsupported: none can.
    """
    if is_quantized(network):
        judge(network)  # what no runtime can is said once
    able, unable = [], {}
    for name, engine in engines(runtime).items():
        try:
            able.append(Candidate(name, engine, engine.compile(network, example, threads=threads)))
        except Unsupported as error:
            unable[name] = str(error)
    if not able:
        reasons = [reason if runtime != AUTO else f"{name}: {reason}" for name, reason in unable.items()]
        raise Unsupported("; ".join(reasons))
    return able, unable


def engines(runtime: str) -> dict[str, Runtime]:
    """The runtime of that name, or all for `auto`, with their default options."""
    names = list(registry.index("runtime")) if runtime == AUTO else [runtime]
    return {name: registry.resolve("runtime", *registry.parse(name))() for name in names}
