"""The verifier decides as trying every input does."""

import pytest
import torch
from quantized import GREY, linear, quantize
from torch import nn

from qbench.verify.classifier import Classifier, Pixels
from qbench.verify.robustness import attack, decide


def two_pixels(seed: int) -> tuple[Classifier, torch.Tensor, int]:
    """A network of two pixels, an image, and its class."""
    pixels = torch.randint(0, 256, (64, 1, 1, 2), generator=torch.Generator().manual_seed(seed))
    model = quantize(linear(seed, 2, 6, 5, 3, size=3.0), GREY.normalize(pixels), bits=5)
    classifier = Classifier.of(model, GREY)
    return classifier, pixels[:1], int(classifier(pixels[:1]).argmax())


@pytest.mark.parametrize("split", ["longest_axis", "abs_gradient", "product"])
def test_every_input_of_a_box_agrees_with_the_verdict(split) -> None:
    states = []
    for seed in range(12):
        classifier, image, target = two_pixels(seed)
        for radius in (0, 3, 12, 40):
            box = Pixels.around(image, radius)
            ranges = (
                torch.arange(float(a), float(b) + 1) for a, b in zip(box.low.flatten(), box.high.flatten(), strict=True)
            )
            every = torch.cartesian_prod(*ranges).view(-1, 1, 1, 2)
            robust = bool((classifier(every).argmax(1) == target).all())
            generator = torch.Generator().manual_seed(0)
            decision = decide(classifier, box, target, seconds=60, steps=5, split=split, generator=generator)
            assert decision.state == ("robust" if robust else "falsified")
            certified = bool((classifier.margins(box, torch.tensor([target])) > 0).all())
            assert certified <= robust
            if decision.witness is not None:
                assert (box.low <= decision.witness).all()
                assert (decision.witness <= box.high).all()
                assert int(classifier(decision.witness[None]).argmax()) != target
            states.append((decision.state, certified, decision.boxes > 1))
    # Each of the ways to a verdict occurs: by bounds alone, by halving, and by an attack.
    assert {("robust", True, False), ("robust", False, True), ("falsified", False, False)} <= set(states)


def test_without_time_there_is_no_verdict() -> None:
    classifier, image, target = two_pixels(0)
    generator = torch.Generator()
    decision = decide(
        classifier, Pixels.around(image, 40), target, seconds=0, steps=5, split="product", generator=generator
    )
    assert decision.state == "timeout"


def test_attacks_find_what_a_step_along_the_gradient_finds() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        model[1].bias.copy_(torch.tensor([0.0, 1.0]))
    classifier = Classifier.of(model, GREY)
    images = torch.tensor([[[[130, 130]]], [[[130, 130]]], [[[200, 200]]]])
    box = Pixels.around(images, 3)
    found = attack(classifier, box, torch.tensor([0, 1, 0]), steps=20, generator=torch.Generator().manual_seed(0))
    assert found[0].flatten().tolist() == [127, 127] or int(classifier(found[0][None]).argmax()) == 1
    assert found[1] is not None
    assert found[2] is None
    (again,) = attack(classifier, Pixels.around(images[:1], 0), torch.tensor([1]), steps=1, generator=torch.Generator())
    assert again.flatten().tolist() == [130, 130]


def test_classifiers_answer_as_the_quantized_network() -> None:
    pixels = torch.randint(0, 256, (64, 1, 1, 2))
    model = quantize(linear(3, 2, 6, 3), GREY.normalize(pixels))
    classifier = Classifier.of(model, GREY)
    assert torch.equal(classifier(pixels), model(GREY.normalize(pixels)))
    x = GREY.normalize(pixels).requires_grad_()
    classifier.network(x).sum().backward()
    assert x.grad.abs().sum() > 0
