"""Training in narrow numbers: it learns, weights stay float32, and what the device cannot do is said."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data, Training
from qbench.errors import Unsupported
from qbench.machine import machine
from qbench.models.base import cross_entropy
from qbench.quant.fakequant import LearnedInput, LearnedWeight
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.quant.training import fit


class Shades:
    """The class is the channel that is brightest."""

    def __init__(self) -> None:
        self.targets = [i % 3 for i in range(48)]
        self.images = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for i, target in enumerate(self.targets):
            self.images[i, target] += 1

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.images[list(positions)]


def make_data(reference: nn.Module | None = None) -> tuple[Data, dict[str, Any]]:
    shades, cpu, records = Shades(), torch.device("cpu"), {}
    training = Training(shades, shades.targets, cpu, None)
    return Data(Batches(shades, cpu), training, cross_entropy, reference=reference, record=records.__setitem__), records


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 3))


def schedule(precision: str, **options: Any) -> Schedule:
    return Schedule(
        epochs=6, batch_size=16, lr=1e-2, optimizer="adamw", precision=precision, **options  # type: ignore[arg-type]
    )  # fmt: skip


def losses(precision: str, **options: Any) -> list[float]:
    data, records = make_data()
    model = fit(network(), data, schedule(precision, **options))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert type(model[4]) is nn.Linear
    assert records["training"]["precision"] == precision
    found: list[float] = records["training"]["loss"]
    return found


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_narrow_products_learn_nearly_as_float_ones_do(precision: str) -> None:
    if precision == "int8":
        pytest.importorskip("torchao")
    wide, narrow = losses("float32"), losses(precision)
    assert narrow != wide
    assert narrow[0] == pytest.approx(wide[0], rel=0.02)
    assert narrow[-1] < 0.2 * narrow[0]


def test_bfloat16_keeps_half_of_the_bytes_for_the_backward_pass() -> None:
    data, records = make_data(reference=network().eval())
    fit(network(), data, schedule("bf16"))
    saved = records["training"]["timing"]["saved_bytes"]
    assert saved["quantized"] < 0.8 * saved["float"]


def test_quantizers_compute_in_float32_under_autocast() -> None:
    seen: list[torch.dtype] = []

    class Watched(LearnedInput):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return super().forward(x)

    def weight(values: Tensor, bits: int, axis: int) -> LearnedWeight:
        return LearnedWeight(values, bits, "channel", axis)

    data, records = make_data(reference=network().eval())
    model = train_quantized(
        network(), data, schedule("bf16"), weight, Watched, name="watched", bits=8, activation_bits=8
    )
    assert set(seen) == {torch.float32}
    assert records["watched"]["deployed_difference"] <= 1e-5
    shades = Shades()
    with torch.no_grad():
        right = (model(shades.images).argmax(1) == torch.tensor(shades.targets)).float().mean()
    assert right > 0.95


def test_what_the_device_cannot_do_is_said() -> None:
    if {"avx512_fp16", "amx_fp16"} & set(machine()["cpu_flags"]):
        pytest.skip("this processor has float16 arithmetic")
    with pytest.raises(Unsupported, match="no float16 arithmetic"):
        losses("fp16")


def test_int8_is_for_linear_layers() -> None:
    pytest.importorskip("torchao")
    convolutions = nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten())
    with pytest.raises(Unsupported, match="linear layers"):
        fit(convolutions, make_data()[0], schedule("int8"))


def test_int8_without_torchao_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="needs torchao"):
        losses("int8")


def test_compiling_calls_the_compiled_network(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    assert losses("float32", compile=True) == losses("float32")
    assert len(compiled) == 1
