"""SPFQ through networks: what is encoded, recorded, drawn and refused."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench import registry
from qbench.data import Batches, Data
from qbench.errors import Unsupported, UserError
from qbench.methods.spfq import spfq
from qbench.quant.encodings import Affine
from qbench.quant.layers import encodings


class Noise:
    def __init__(self, images: int) -> None:
        self.x = torch.randn(images, 3, 12, 12, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


def data_for(model: nn.Module, records: dict[str, Any] | None = None, images: int = 24, seed: int = 0) -> Data:
    store = {} if records is None else records
    batches = Batches(Noise(images), torch.device("cpu"), batch_size=8)
    loss = nn.functional.cross_entropy
    return Data(batches, None, loss, reference=copy.deepcopy(model), seed=seed, record=store.__setitem__)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, groups=2, dilation=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 10),
    ).eval()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = -1  # dead: neither the weight of the first layer nor the input of the second is anything
    return model


def output_error(model: nn.Module, original: nn.Module) -> float:
    with torch.no_grad():
        x = Noise(24).x
        return float((model(x) - original(x)).norm() / original(x).norm())


@pytest.mark.parametrize("options", [{}, {"order": 3}, {"order": 2, "granularity": "channel"}])
def test_every_layer_has_the_levels_it_says(options: dict[str, Any]) -> None:
    original, records = network(), {}
    model = spfq(copy.deepcopy(original), data_for(original, records), bits=4, **options)
    attached = encodings(model)
    assert len(attached) == len(records["layer_error"]) == 4
    assert all(isinstance(e, Affine) and (e.low, e.high) == (-8, 8) for e in attached.values())
    assert records["spfq"] == {"quantized": 4, "unreached": []}
    assert output_error(model, original) < 0.5


def test_the_recorded_error_is_the_layer_error() -> None:
    original, records = network(), {}
    model = spfq(copy.deepcopy(original), data_for(original, records), bits=4, order=2, oversample=None)
    with torch.no_grad():
        x = Noise(24).x
        bias = original[-1].bias
        error = float((model(x) - original(x)).norm() / (original(x) - bias).norm())
    assert records["layer_error"]["7"] == pytest.approx(error, rel=1e-3)


def test_an_infinite_alphabet_takes_the_codes_it_needs() -> None:
    original, records = network(), {}
    model = spfq(copy.deepcopy(original), data_for(original, records), bits=2, alphabet="infinite", c=0.5)
    for encoding in encodings(model).values():
        assert isinstance(encoding, Affine)
        assert encoding.high == -encoding.low == int(encoding.codes.abs().max())
    assert max(e.high for e in encodings(model).values() if isinstance(e, Affine)) > 2
    assert all(layer["saturated"] == 0 for layer in records["error_terms"]["layers"].values())


def test_draws_follow_the_seed() -> None:
    original = network()
    first, again, other = (
        spfq(copy.deepcopy(original), data_for(original, seed=seed), bits=3)[7].weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_image_is_enough() -> None:
    original = network()
    model = spfq(copy.deepcopy(original), data_for(original, images=1), bits=4, order=2)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_layers_have_bits_of_their_own() -> None:
    original = network()
    options = {"layer_bits": {"0": 8, "4": 32}, "edge_bits": 6, "skip": ("2",)}
    model = spfq(copy.deepcopy(original), data_for(original), bits=2, **options)
    assert {name: e.high for name, e in encodings(model).items()} == {"0.weight": 128, "7.weight": 32}


def test_what_cannot_be_done_is_said() -> None:
    transposed = nn.Sequential(nn.ConvTranspose2d(3, 4, 2)).eval()
    with pytest.raises(Unsupported, match=r"^0: .*ConvTranspose2d.*skip"):
        spfq(transposed, data_for(transposed))
    model = network()
    with pytest.raises(UserError, match="no layer is named 'head'"):
        spfq(model, data_for(model), layer_bits={"head": 8})
    with pytest.raises(UserError, match="order"):
        registry.resolve("method", "spfq", {"order": 0})
    with pytest.raises(UserError, match="layer_bits"):
        registry.resolve("method", "spfq", {"layer_bits": {"0": 40}})
