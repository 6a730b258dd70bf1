"""GPFQ through networks: what is encoded, recorded and refused."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from qbench import registry
from qbench.data import Batches, Data
from qbench.errors import Unsupported, UserError
from qbench.methods.gpfq import gpfq
from qbench.methods.rtn import rtn
from qbench.quant.encodings import Affine, Codebook
from qbench.quant.layers import encodings, named_weight_layers


class Noise:
    def __init__(self, images: int = 24, size: int = 32) -> None:
        self.x = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


def data_for(model: nn.Module | None, records: dict[str, Any] | None = None) -> Data:
    store = {} if records is None else records
    reference = None if model is None else copy.deepcopy(model)
    batches = Batches(Noise(), torch.device("cpu"), batch_size=8)
    return Data(batches, None, nn.functional.cross_entropy, reference=reference, record=store.__setitem__)


def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("test_efficientnet").eval()


def output_error(model: nn.Module, original: nn.Module) -> float:
    with torch.no_grad():
        x = Noise().x
        return float((model(x) - original(x)).norm() / original(x).norm())


def test_the_whole_network_is_quantized_and_closer_than_by_rounding() -> None:
    original, records = network(), {}
    model = gpfq(copy.deepcopy(original), data_for(original, records), bits=4, granularity="channel", c=1.0)
    attached = encodings(model)
    assert attached.keys() == {f"{name}.weight" for name in named_weight_layers(model)}
    assert all(isinstance(e, Affine) and (e.low, e.high) == (-8, 8) for e in attached.values())
    assert records["layer_error"].keys() == named_weight_layers(model).keys()
    assert records["gpfq"] == {"quantized": len(attached), "unreached": []}
    rounded = rtn(copy.deepcopy(original), data_for(original), bits=4)
    assert output_error(model, original) < 0.8 * output_error(rounded, original)


def test_the_recorded_error_is_the_layer_error() -> None:
    torch.manual_seed(0)
    original, records = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), {}
    model = gpfq(copy.deepcopy(original), data_for(original, records), bits=3, oversample=None)
    with torch.no_grad():
        x = Noise().x
        wanted = original(x) - original[2].bias[:, None, None]
        error = float((model(x) - original(x)).norm() / wanted.norm())
    assert records["layer_error"]["2"] == pytest.approx(error, rel=1e-4)


def test_bias_correction_removes_the_mean_error_and_makes_biases() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)).eval()
    model = gpfq(copy.deepcopy(original), data_for(original), bits=2, bias_correction=True, oversample=None)
    with torch.no_grad():
        x = Noise().x
        for cut in (1, 3):
            difference = (model[:cut](x) - original[:cut](x)).mean((0, 2, 3))
            assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({"alphabet": "clipped", "step": "mse"}, 8),
        ({"alphabet": "linspace_zero"}, 9),
        ({"alphabet": "median", "levels": 3, "c": 3.0}, 3),
        ({"sparsity": "soft", "threshold": 0.001}, 9),
        ({"sparsity": "hard", "threshold": 0.001, "granularity": "channel"}, 11),
        ({"act_order": True, "percentile": 99.0, "granularity": "channel"}, 9),
        ({"patch_stride": "kernel", "retain": 0.25, "images": 16}, 9),
    ],
)
def test_every_option_gives_the_levels_it_says(options: dict[str, Any], levels: int) -> None:
    original = network()
    model = gpfq(copy.deepcopy(original), data_for(original), bits=3, **options)
    for name, encoding in encodings(model).items():
        assert isinstance(encoding, (Affine, Codebook))
        sizes = encoding.levels if isinstance(encoding, Affine) else encoding.levels.shape[-1]
        assert sizes == levels, name
        assert all(len(row.unique()) <= levels for row in encoding.decode().flatten(1))
    with torch.no_grad():
        assert model(Noise().x).isfinite().all()


def test_soft_thresholds_make_zeros() -> None:
    original = network()

    def zeros(**options: Any) -> float:
        model = gpfq(copy.deepcopy(original), data_for(original), bits=4, **options)
        weights = torch.cat([layer.weight.flatten() for layer in named_weight_layers(model).values()])
        return float((weights == 0).float().mean())

    assert zeros(sparsity="soft", threshold=0.02) > zeros() + 0.05


def test_it_is_the_same_for_a_seed() -> None:
    original = network()
    first, second = (gpfq(copy.deepcopy(original), data_for(original), oversample=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_edges_and_skipped_layers() -> None:
    original = network()
    model = gpfq(copy.deepcopy(original), data_for(original), bits=2, edge_bits=8, skip=("blocks.0",))
    attached = encodings(model)
    assert not any(name.startswith("blocks.0") for name in attached)
    assert attached["conv_stem.weight"].high == attached["classifier.weight"].high == 128


def test_transformers_work() -> None:
    original = create_model("test_vit", img_size=32, patch_size=16).eval()
    model = gpfq(copy.deepcopy(original), data_for(original), bits=4)
    assert len(encodings(model)) == len(named_weight_layers(model))


def test_what_cannot_be_done_is_said() -> None:
    transposed = nn.Sequential(nn.ConvTranspose2d(3, 4, 2)).eval()
    with pytest.raises(Unsupported, match=r"^0: .*ConvTranspose2d.*skip"):
        gpfq(transposed, data_for(transposed))
    model = network()
    with pytest.raises(UserError, match="alphabet"):
        gpfq(model, data_for(model), alphabet="clipped", sparsity="hard")
    with pytest.raises(UserError, match="step=mse"):
        gpfq(model, data_for(model), alphabet="median", step="mse")
    with pytest.raises(UserError, match="levels"):
        gpfq(model, data_for(model), levels=3)
    with pytest.raises(UserError, match="threshold=50"):
        gpfq(model, data_for(model), sparsity="hard", threshold=50.0)
    with pytest.raises(UserError, match="99 calibration images"):
        gpfq(model, data_for(model), images=99)
    with pytest.raises(UserError, match="bits"):
        registry.resolve("method", "gpfq", {"bits": 0})
