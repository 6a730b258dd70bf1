"""How far quantization moves the answers to any image near the given ones: bounds from above and from below."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.metrics.base import Finished
from qbench.quant import structure
from qbench.registry import metric
from qbench.verify.chain import Link, links, stages, twins
from qbench.verify.classifier import Pixels, straight_through
from qbench.verify.exact import Exact
from qbench.verify.graph import trace
from qbench.verify.ibp import FLOAT32
from qbench.verify.interval import Interval
from qbench.verify.reach import Reach, Reached, counterparts
from qbench.verify.verdict import Verdict, judge, largest, search

_SAME = 1e-4  # of the largest output: what re-ordered float32 sums may differ by
_TOLERANCE = 1e-4  # of the program's bounds
_STARTS = 2  # ascents for each output and sign


@metric("quantization_error", unit="%", direction="higher", task="classification")
def quantization_error(
    finished: Finished,
    *,
    bound: Annotated[float, Field(gt=0)] = 1.0,
    radius: Annotated[int, Field(ge=0, le=255)] = 1,
    images: Annotated[int, Field(ge=1)] = 20,
    seconds: Annotated[float, Field(ge=0)] = 1.0,
    samples: Annotated[int, Field(ge=1)] = 50,
    steps: Annotated[int, Field(ge=0)] = 10,
) -> dict[str, Any]:
    """Share of images for which no output of the quantized network is `bound` or more from the float one's, proved.

    It holds for whatever each pixel changes by up to `radius`. In the manner of QEBVerif (arXiv:2212.02781): intervals
    of the differences; a search for large ones; and where these do not decide, for linear layers with ReLU between
    them, a mixed-integer program, whose proofs hold up to its solver's tolerances. Networks run on the CPU.

    Args:
        finished: the run.
        bound: in units of the outputs, which are logits.
        radius: of 255.
        images: how many are looked at, the first ones.
        seconds: that the program may take for an image; 0 leaves it out.
        samples: random images that a search begins with.
        steps: of a search.

    Returns:
        `value`, and for each image: `state`, `proved`, `falsified` or `open`; `by_intervals`, whether they proved it;
        `upper`, which the largest difference of an output is proved not to exceed, and `lower`, the largest that was
        found; `seconds`. `program`: empty, or why there is none for this network.

    Raises:
        Unsupported: there are no bounds for an operation, or the float network has another structure.
        ValueError: a difference was found above a proved bound, so that the proof is wrong.
    """
    pair = _Pair(finished, seconds)
    count = min(images, len(finished.images))
    rows = []
    for i in range(count):
        begin, box = time.monotonic(), Pixels.around(finished.images.pixels([i]), radius)
        verdict = pair.verify(box, bound, samples, steps, finished.data.seed)
        upper, lower = largest(verdict.proved), largest(verdict.found)
        if lower > upper + _TOLERANCE * (1 + upper):
            raise ValueError(f"image {i}: a difference of {lower} was found, and proved to be at most {upper}")
        row = {"state": verdict.state, "by_intervals": verdict.by_intervals, "upper": upper, "lower": lower}
        rows.append(row | {"seconds": time.monotonic() - begin})
    share = sum(row["state"] == "proved" for row in rows) / count
    return {"value": 100 * share, "program": pair.refused, **{key: [row[key] for row in rows] for key in rows[0]}}


class _Pair:
    """The quantized network and the float one."""

    def __init__(self, finished: Finished, seconds: float) -> None:
        self.preprocess, self.seconds = finished.model.preprocess, seconds
        floats = alike(finished.load_float(), finished.quantized, finished.data.example)
        self.floats = floats.cpu().requires_grad_(False)
        self.quantized = straight_through(finished.quantized)
        self.graph = trace(self.quantized)
        self.counterparts = counterparts(self.graph, trace(self.floats))
        self.chain: list[Link] | None = None
        self.refused = ""
        try:
            self.chain = links(self.graph) if seconds else None
        except Unsupported as reason:
            self.refused = str(reason)

    def verify(self, box: Pixels, bound: float, samples: int, steps: int, seed: int) -> Verdict:
        """What is known of one box."""
        ends = (self.preprocess.normalize(end).double() for end in (box.low, box.high))
        inputs, reach = Interval(*ends), Reach(self.counterparts, FLOAT32)
        same = Interval(torch.zeros_like(inputs.low), torch.zeros_like(inputs.low))
        proved = reach.run(self.graph, Reached(inputs, inputs, same)).difference
        low, high = (end.double().flatten() for end in (box.low, box.high))
        difference = partial(self.difference, box.low.shape[1:])
        points = search(difference, low, high, samples=samples, steps=steps, seed=seed, starts=_STARTS)
        program = None
        if self.chain is not None:
            both = twins(self.chain, self.counterparts, self.preprocess)
            program = partial(Exact, both, low, high, stages(self.chain, reach.seen))
        inside = Interval(proved.low[0], proved.high[0])
        return judge(inside, difference, points, epsilon=bound, seconds=self.seconds, program=program)

    def difference(self, shape: torch.Size, points: Tensor) -> Tensor:
        """Outputs (points, n) of the quantized network less those of the float one, for pixels (points, d)."""
        x = self.preprocess.normalize(points.view(-1, *shape))
        return (self.quantized(x) - self.floats(x)).double()


def alike(floats: nn.Module, quantized: nn.Module, example: Tensor) -> nn.Module:
    """The float network with the structure of the quantized one.

    Raises:
        Unsupported: it does not answer as before: a step of the recipe changed more than the structure.
    """
    with torch.no_grad():
        before = floats(example)
        structure.replay(floats, structure.record(quantized))
        after = floats.eval()(example)
    if not torch.allclose(before, after, rtol=0, atol=_SAME * float(before.abs().max())):
        raise Unsupported("the recipe's structural steps change what the float network answers")
    return floats
