"""How many images keep their class whatever changes within a few grey levels, proved."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from qbench.metrics.base import Finished
from qbench.registry import metric
from qbench.verify.classifier import Classifier, Pixels
from qbench.verify.robustness import Split, attack, decide


@metric("certified_accuracy", unit="%", direction="higher", task="classification")
def certified_accuracy(
    finished: Finished,
    *,
    radius: Annotated[int, Field(ge=0, le=255)] = 1,
    images: Annotated[int, Field(ge=1)] = 50,
    seconds: Annotated[float, Field(ge=0)] = 1.0,
    steps: Annotated[int, Field(ge=1)] = 20,
    split: Split = "longest_axis",
) -> dict[str, Any]:
    """Share of images that are classified correctly whatever each of their pixels changes by up to `radius`, proved.

    In the manner of QA-IBP (arXiv:2211.16187). Proofs hold for all images of whole pixels, and for float32, however
    it rounds; the network runs on the CPU.

    Args:
        finished: the run.
        radius: of 255.
        images: how many are looked at, the first ones.
        seconds: that the complete verifier may take for an image.
        steps: of an attack.
        split: which pixel's range the complete verifier halves.

    Returns:
        `value`, and for each image: `clean`, whether it is classified correctly; `attacked`, whether it still is where
        an attack went; `certified`, whether intervals prove that it always is; `state`, `wrong` if not even that image
        is classified correctly, else `robust`, `falsified` or `timeout` by the complete verifier; `boxes` and `seconds`
        that this took. `differ`: for how many images `clean` is not what was scored.

    Raises:
        Unsupported: there are no bounds for an operation of the network.
        ValueError: an attack succeeded on what was proved, so that the proof is wrong.
    """
    classifier = Classifier.of(finished.quantized, finished.model.preprocess)
    generator = torch.Generator().manual_seed(finished.data.seed)
    count = min(images, len(finished.images))
    rows: list[dict[str, Any]] = []
    for i, target in enumerate(finished.images.split.targets[:count]):
        begin, pixels = time.monotonic(), finished.images.pixels([i])
        row = _attacked(classifier, pixels, target, radius, steps, generator)
        if row["state"] == "timeout" and seconds > 0:
            box = Pixels.around(pixels, radius)
            decision = decide(classifier, box, target, seconds=seconds, steps=steps, split=split, generator=generator)
            row |= {"state": decision.state, "boxes": decision.boxes}
        rows.append(row | {"seconds": time.monotonic() - begin})
    check(rows)
    differ = [row["clean"] != bool(right) for row, right in zip(rows, finished.outcomes["correct"], strict=False)]
    return {
        "value": 100 * sum(row["state"] == "robust" for row in rows) / count,
        "differ": sum(differ),
        **{key: [row[key] for row in rows] for key in rows[0]},
    }


def _attacked(
    classifier: Classifier, pixels: Tensor, target: int, radius: int, steps: int, generator: torch.Generator
) -> dict[str, Any]:
    """What is known of one image without the complete verifier."""
    targets, box = torch.tensor([target]), Pixels.around(pixels, radius)
    with torch.no_grad():
        clean = int(classifier(pixels).argmax()) == target
        certified = bool((classifier.margins(box, targets) > 0).all())
    (witness,) = attack(classifier, box, targets, steps=steps, generator=generator)
    attacked = clean and witness is None
    state = "robust" if certified else "timeout" if attacked else "falsified" if clean else "wrong"
    return {"clean": clean, "attacked": attacked, "certified": certified, "state": state, "boxes": 1}


def check(rows: Sequence[Mapping[str, Any]]) -> None:
    """Whoever is certified withstands the attack, and whoever does that is correct.

    Raises:
        ValueError: an image is not like that.
    """
    for i, row in enumerate(rows):
        if not row["certified"] <= (row["state"] == "robust") <= row["attacked"] <= row["clean"]:
            raise ValueError(f"image {i} cannot be proved robust and be attacked or wrong as well: {dict(row)}")
