"""Histograms of layer inputs: the same from the cache as computed, with quantizers of the layers off."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.methods.activations import activations
from qbench.quant.activations import StaticQuantizer, input_quantizers, quantize_input
from qbench.quant.input_histograms import input_histograms
from qbench.quant.observers import Histogram
from qbench.sharing import Shared


class Pictures:
    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 12

    def batch(self, positions: Sequence[int]) -> Tensor:
        self.reads += 1
        pictures = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return (pictures * torch.arange(1, 13).reshape(-1, 1, 1, 1))[list(positions)]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    model.unused = nn.ModuleList([nn.Linear(2, 2)])
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))  # type: ignore[method-assign]
    return model


def data_in(folder: Path | None, pictures: Pictures) -> Data:
    batches = Batches(pictures, torch.device("cpu"), batch_size=4, fingerprint="pictures")
    return Data(batches, None, nn.functional.cross_entropy, shared=Shared(folder))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in ("0", "2", "4", "unused.0")}


def same(a: Histogram, b: Histogram) -> bool:
    return a.dump().tobytes() == b.dump().tobytes()


def test_read_bit_for_bit_without_looking_at_an_image(tmp_path: Path) -> None:
    model, pictures = network(), Pictures()
    computed, first, again = (data_in(folder, pictures) for folder in (None, tmp_path, tmp_path))
    want = input_histograms(model, layers(model), computed, computed.calibration)
    assert want.keys() == {"0", "2", "4"}
    written = input_histograms(model, layers(model), first, first.calibration)
    before = pictures.reads
    found = input_histograms(model, layers(model), again, again.calibration)
    assert pictures.reads == before
    for name, histogram in want.items():
        assert same(written[name], histogram)
        assert same(found[name], histogram)
        assert found[name].average == histogram.average
        assert found[name].grid(bits=4, calibration="mse") == histogram.grid(bits=4, calibration="mse")


def test_a_part_of_the_images_is_something_else(tmp_path: Path) -> None:
    model, data = network(), data_in(tmp_path, Pictures())
    all_of_them = input_histograms(model, layers(model), data, data.calibration)
    one = input_histograms(model, layers(model), data, data.calibration.first(1))
    other_batches = input_histograms(model, layers(model), data, data.calibration.first(12, batch_size=3))
    assert one["0"].high < all_of_them["0"].high
    assert other_batches["0"].average != all_of_them["0"].average
    assert other_batches["0"].high == all_of_them["0"].high


def test_quantizers_of_these_layers_are_off() -> None:
    model, data = network(), data_in(None, Pictures())
    want = input_histograms(model, layers(model), data, data.calibration)
    coarse = StaticQuantizer(2, False, 1.0)
    quantize_input(model[0], coarse)
    got = input_histograms(model, layers(model), data, data.calibration)
    assert all(same(got[name], want[name]) for name in want)
    assert input_quantizers(model) == {"0": coarse}


@pytest.mark.parametrize("calibration", ["minmax", "ema", "percentile", "kl_tensorrt"])
def test_options_of_the_calibration_share_one_pass(tmp_path: Path, calibration: str) -> None:
    pictures = Pictures()
    activations(network(), data_in(tmp_path, pictures), calibration="mse")
    before = pictures.reads
    got = activations(network(), data_in(tmp_path, pictures), calibration=calibration, bits=6)  # type: ignore[arg-type]
    assert pictures.reads == before
    want = activations(network(), data_in(None, pictures), calibration=calibration, bits=6)  # type: ignore[arg-type]
    ours, theirs = (input_quantizers(model) for model in (got, want))
    assert ours.keys() == theirs.keys()
    for name, quantizer in ours.items():
        torch.testing.assert_close(quantizer.state_dict(), theirs[name].state_dict(), rtol=0, atol=0)
