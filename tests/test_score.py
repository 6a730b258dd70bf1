"""Scoring: right outcomes, however they are computed, and clear words for outputs that cannot be scored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from qbench import floatruntime, registry, score
from qbench.datasets.base import Boxes, Split
from qbench.datasets.images import ImageArray, open_images
from qbench.metrics.ap import ap_from_matches, match
from qbench.metrics.map import coco_stats
from qbench.models.base import Detections, Model, Preprocess
from qbench.quant.activations import StaticQuantizer, quantize_input

CPU = torch.device("cpu")
OWN = Preprocess((8, 8), resize=8, mean=(0.0,) * 3, std=(1.0,) * 3)


class Brightness(nn.Module):
    """Ten logits that are largest at the image's brightness."""

    def forward(self, x: Tensor) -> Tensor:
        level = x.mean((1, 2, 3)) * 255
        return -(level[:, None] - torch.arange(10, device=x.device)).abs()


class Network(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((2, 3)), x.amax((1, 2, 3))


def images(folder: Path, targets: list[int], size: tuple[int, int] = (8, 8), own: Preprocess = OWN) -> ImageArray:
    split = Split([str(i) for i in range(len(targets))], lambda i: Image.new("RGB", size, (i % 10,) * 3), targets)
    return open_images(split, own, str(targets), folder, "evaluation")


def spec(module: nn.Module, own: Preprocess = OWN, decode: Callable[[Any], list[Detections]] | None = None) -> Model:
    return Model("detection" if decode else "classification", lambda: module, None, own, decode=decode)  # type: ignore[arg-type]


def run(module: nn.Module, found: ImageArray, model: Model | None = None, **options: Any) -> Any:
    return score.score(module, model or spec(module), found, device=CPU, threads=1, **options)


def test_outcomes_of_a_known_classifier(tmp_path: Path) -> None:
    outcomes, notes = run(Brightness(), images(tmp_path, [0, 1, 2, 3, 9, 5, 8]), batch_size=3)
    assert outcomes["prediction"].tolist() == list(range(7))
    assert outcomes["correct"].tolist() == [True, True, True, True, False, True, False]
    assert outcomes["top5"].tolist() == [True, True, True, True, False, True, True]
    assert (notes["images"], notes["batch_size"], notes["executed"]) == (7, 3, "eager")
    assert notes["seconds"] > 0


def test_the_parameters_can_still_be_trained(tmp_path: Path) -> None:
    network = Network()
    run(network, images(tmp_path, [0, 1]))
    network(torch.zeros(1, 3, 8, 8)).sum().backward()


class Hungry(Brightness):
    """Fails on batches of more than two."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_batches_are_halved_when_memory_does_not_suffice(tmp_path: Path) -> None:
    outcomes, notes = run(Hungry(), images(tmp_path, list(range(10))), batch_size=8)
    assert outcomes["correct"].all()
    assert notes["batch_size"] == 2


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("a bug")


class Wrong(nn.Module):
    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(x)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: torch.full((len(x), 10), torch.nan), "not finite"),
        (lambda x: torch.zeros(len(x), 3), r"\(4, 3\) instead of logits \(4, 4 or more\)"),
        (lambda x: torch.zeros(1, 10), "instead of logits"),
        (lambda x: x, "instead of logits"),
        (lambda x: {"logits": x}, "dict instead of logits"),
    ],
)
def test_outputs_that_cannot_be_scored(tmp_path: Path, output: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Wrong(output), images(tmp_path, [0, 1, 2, 3]))


def test_an_error_of_the_network_is_not_taken_for_memory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        run(Failing(), images(tmp_path, [0, 1]))


def test_boxes_are_in_pixels_of_the_original_image(tmp_path: Path) -> None:
    own = Preprocess((8, 8), mode="squash")

    def decode(outputs: Tensor) -> list[Detections]:
        one = Detections(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([0.5]), torch.tensor([3]))
        none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        return [one, none][: len(outputs)]

    found = images(tmp_path, [0, 0], (80, 16), own)
    outcomes, _ = run(nn.Identity(), found, spec(nn.Identity(), own, decode), batch_size=2)
    assert outcomes["image"].tolist() == [0]
    assert outcomes["xyxy"].tolist() == [[10.0, 4.0, 40.0, 16.0]]
    assert (outcomes["score"].tolist(), outcomes["label"].tolist()) == ([0.5], [3])


def test_a_detector_that_finds_nothing_scores_zero(tmp_path: Path) -> None:
    own = Preprocess((8, 8), mode="squash")

    def decode(outputs: Tensor) -> list[Detections]:
        return [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))] * len(outputs)

    outcomes, _ = run(nn.Identity(), images(tmp_path, [0] * 3, own=own), spec(nn.Identity(), own, decode))
    targets = [Boxes(np.array([[1, 1, 5, 5]], np.float32), np.array([label])) for label in range(3)]
    stats = coco_stats(targets, outcomes, 3)
    assert stats["AP"] == stats["AR100"] == 0
    assert ap_from_matches(match(outcomes, targets, 3), np.ones((1, 3))).tolist() == [0]


@pytest.mark.parametrize("module", [Network(), Two()])
def test_the_float_runtime_gives_the_same_answers(module: nn.Module) -> None:
    pytest.importorskip("openvino")
    x = torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    compiled = floatruntime.compile(module.eval(), x, threads=1)
    for part in (x, x[:3]):
        found, wanted = compiled(part), module(part)
        pairs = [(found, wanted)] if isinstance(wanted, Tensor) else zip(found, wanted, strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b.detach())


class Traced(Network):
    """Answers differently when it is converted, as a network with control flow may."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if torch.jit.is_tracing() else 1)


def test_the_float_runtime_is_refused_when_it_does_not_agree() -> None:
    pytest.importorskip("openvino")
    with pytest.raises(floatruntime.Refused, match="does not agree"):
        floatruntime.compile(Traced().eval(), torch.rand(4, 3, 8, 8), threads=1)


def test_how_it_was_executed_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(score, "_WORTH_CONVERTING", 0)
    network, found = Network(), images(tmp_path, [0, 1, 2])
    plain = network.eval()(found.batch(range(3))).argmax(1).tolist()
    outcomes, notes = run(network, found)
    assert (outcomes["prediction"].tolist(), notes["executed"]) == (plain, "openvino float32")
    quantize_input(network[3], StaticQuantizer(scale=0.01))
    assert run(network, found)[1]["executed"] == "eager (it quantizes activations)"


def test_agreement_is_bit_for_bit(tmp_path: Path) -> None:
    found = images(tmp_path, list(range(10)))
    one, other = Network(), Network()
    assert score.agree(one, other, found, 20) == {"images": 10, "equal": True, "max_difference": 0.0}
    with torch.no_grad():
        bias = other[3].bias
        bias[0] = float(np.nextafter(np.float32(bias[0]), np.float32(9)))
    apart = score.agree(one, other, found, 4)
    assert apart["images"] == 4
    assert not apart["equal"]
    assert 0 < apart["max_difference"] < 1e-6
    assert score.agree(one, Two(), found, 4)["max_difference"] == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "timm",
            {
                "name": "mobilenetv2_100",
                "checkpoint": "mobilenetv2_100.safetensors",
                "args": {"pad_type": "same", "bn_eps": 1e-3},
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
            },
            80.0,
        ),
        ("mobilenetv1", {}, 65.5),
    ],
)
def test_float_accuracy_on_imagenet(
    shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, options: dict[str, Any], expected: float
) -> None:
    monkeypatch.setenv("QBENCH_DATA", str(shared / "data"))
    monkeypatch.setenv("QBENCH_WEIGHTS", str(shared / "weights"))
    dataset = registry.resolve("dataset", "imagenet")()
    model = registry.resolve("model", name, options)()
    found = open_images(dataset.evaluation, model.preprocess, dataset.fingerprint, tmp_path, "evaluation")
    outcomes, _ = score.score(model.load(), model, found, device=CPU, threads=2)
    assert 100 * outcomes["correct"].mean() == pytest.approx(expected, abs=0.2)
