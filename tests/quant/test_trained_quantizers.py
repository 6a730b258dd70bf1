"""What must hold of every quantizer that training goes through: what is deployed is what was trained."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qbench.quant.activations import build, describe, input_quantizer, quantize_input
from qbench.quant.audit import audit
from qbench.quant.cpq import CpqInput, CpqWeight
from qbench.quant.direct import DirectInput, DirectWeight
from qbench.quant.dorefa import FixedInput, SignWeight, TanhWeight
from qbench.quant.dropbits import DropBitsWeight
from qbench.quant.encodings import leaves
from qbench.quant.fakequant import (
    LearnedInput,
    LearnedWeight,
    deploy,
    keep_positive,
    quantize_weight,
)
from qbench.quant.free_weights import update_quantizers
from qbench.quant.layers import encodings
from qbench.quant.learned_levels import LevelsInput, LevelsWeight
from qbench.quant.lsq_plus import OffsetInput, three_deviations
from qbench.quant.pact import ClippedInput, SawbWeight
from qbench.quant.powers import PowerWeight
from qbench.quant.range_input import RangeInput
from qbench.quant.recomputed import MsqeWeight, RecomputedWeight

CHANNEL = {"granularity": "channel"}
TENSOR = {"granularity": "tensor"}
WEIGHTS: dict[str, Callable[..., nn.Module]] = {
    "lsq": partial(LearnedWeight, **CHANNEL),
    "lsq_plus": partial(LearnedWeight, **TENSOR, narrow=True, start=three_deviations),
    "ste": partial(RecomputedWeight, **CHANNEL),
    "msqe": partial(MsqeWeight, **TENSOR, search="alternating", momentum=0.5, hysteresis=0.1),
    "msqe_float": partial(MsqeWeight, **CHANNEL, power_of_two=False),
    "power": partial(PowerWeight, **CHANNEL),
    "dorefa": TanhWeight,
    "dorefa_unit": partial(TanhWeight, unit=True),
    "sawb": SawbWeight,
    "cpq": CpqWeight,
    "dropbits": DropBitsWeight,
    "direct": partial(DirectWeight, **CHANNEL),
    "apot": LevelsWeight,
    "sign": lambda weight, bits, axis: SignWeight(axis),
}
INPUTS: dict[str, Callable[[int], nn.Module]] = {
    "lsq": LearnedInput,
    "lsq_plus": OffsetInput,
    "ste": RangeInput,
    "dorefa": FixedInput,
    "dorefa_unit": partial(FixedInput, unit=True),
    "pact": ClippedInput,
    "pact_limit": partial(ClippedInput, limit=0.5),
    "cpq": CpqInput,
    "direct": DirectInput,
    "apot": LevelsInput,
}
LAYERS = [nn.Conv2d(4, 6, 3, groups=2), nn.Linear(7, 5), nn.ConvTranspose2d(4, 6, 3)]


def train(layer: nn.Module, inputs: Callable[[], Tensor], steps: int = 3) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    layer.train()
    for _ in range(steps):
        optimizer.zero_grad()
        layer(inputs()).square().mean().backward()
        optimizer.step()
        keep_positive(layer)
        update_quantizers(layer)
    layer.eval()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("layer", LAYERS, ids=["conv", "linear", "transposed"])
def test_a_deployed_weight_is_what_was_trained(layer: nn.Module, name: str, bits: int) -> None:
    layer = copy.deepcopy(layer)
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    with torch.no_grad():
        layer.weight.select(axis, 0).zero_()  # a dead channel
    quantizer = WEIGHTS[name](layer.weight.detach(), bits=bits, axis=axis)
    quantize_weight(layer, quantizer)
    start = layer.weight.detach().clone()
    shape = (3, 7) if isinstance(layer, nn.Linear) else (2, 4, 5, 5)
    train(layer, lambda: torch.randn(shape))
    seen = layer.weight.detach().clone()
    assert seen.isfinite().all()
    assert not torch.equal(seen, start)
    deploy(layer)
    assert torch.equal(layer.weight, seen)
    (encoding,) = encodings(layer).values()
    assert sum(leaf.nominal_bits for leaf in leaves(encoding)) <= bits * seen.numel()
    assert all(claim["used"] <= claim["levels"] for claim in audit(layer).values())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", INPUTS)
def test_a_deployed_input_is_what_was_trained_and_can_be_stored(name: str, bits: int, signed: bool) -> None:
    layer = nn.Linear(16, 4)
    quantize_input(layer, INPUTS[name](bits))
    train(layer, lambda: torch.randn(32, 16) if signed else torch.rand(32, 16).sub(0.2).relu())
    x = 2 * torch.randn(64, 16)
    expected = layer(x)
    own = input_quantizer(layer)
    assert own(x).unique().numel() <= 2**bits
    deploy(layer)
    assert torch.equal(layer(x), expected)
    fixed = input_quantizer(layer)
    assert fixed.bits == bits
    assert fixed.levels <= 2**bits
    again = build(describe(fixed))
    again.load_state_dict(fixed.state_dict())
    assert torch.equal(again(x), fixed(x))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("x", [torch.zeros(4, 8), torch.randn(1, 8)], ids=["zeros", "one image"])
def test_any_first_batch_will_do(name: str, x: Tensor) -> None:
    own = INPUTS[name](4)
    assert own(x).isfinite().all()
    assert own(torch.randn(4, 8)).isfinite().all()
