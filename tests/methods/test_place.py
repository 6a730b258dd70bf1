"""A network quantized for a profile satisfies it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qbench import profiles, registry
from qbench.data import Batches, Data
from qbench.errors import UserError
from qbench.models.base import cross_entropy
from qbench.quant.placement import placement


class _Noise:
    def __len__(self) -> int:
        return 8

    def batch(self, positions: object) -> Tensor:
        return torch.stack([torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(p)) for p in positions])  # type: ignore[attr-defined]


def _data(reference: nn.Module | None = None) -> Data:
    return Data(Batches(_Noise(), torch.device("cpu")), None, cross_entropy, reference=reference)


def _placed(step: str, name: str = "digits_resnet") -> nn.Module:
    model = registry.resolve("model", name)().load()
    reference = copy.deepcopy(model)
    placed: nn.Module = registry.resolve("method", *registry.parse(step))(model, _data(reference))
    return placed.eval()


@pytest.mark.parametrize("model", ["digits_resnet", "digits_efficientnet", "digits_vit"])
@pytest.mark.parametrize("name", profiles.names())
def test_it_satisfies_the_profile_that_it_was_made_for(name: str, model: str) -> None:
    placed = _placed(f"place[profile={name}]", model)
    facts = placement(placed, torch.randn(1, 1, 32, 32))
    assert profiles.violations(profiles.load(name), facts) == []


def test_profiles_tell_networks_apart() -> None:
    facts = placement(_placed("place[profile=fbgemm]"), torch.randn(1, 1, 32, 32))
    fitting = [name for name in profiles.names() if not profiles.violations(profiles.load(name), facts)]
    assert fitting == ["every_edge", "fbgemm"]
    facts = placement(_placed("place[profile=power_of_two]"), torch.randn(1, 1, 32, 32))
    assert profiles.violations(profiles.load("tensorrt"), facts) == []


def test_other_roundings_get_the_same_grid() -> None:
    one, other = (_placed(f"place[profile=tensorrt,method={method}]") for method in ("rtn", "gptq"))
    facts = [placement(model, torch.randn(1, 1, 32, 32)) for model in (one, other)]
    assert facts[0] == facts[1]
    assert not torch.equal(one.layer1[0].conv1.weight, other.layer1[0].conv1.weight)


def test_the_float_network_is_folded_alike_and_left_as_it_was() -> None:
    model = registry.resolve("model", "digits_resnet")().load()
    reference = copy.deepcopy(model)
    before = copy.deepcopy(reference.state_dict())
    registry.resolve("method", "place", {"profile": "fbgemm", "method": "gptq"})(model, _data(reference))
    assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("place[profile=fbgem]", "did you mean 'fbgemm'"),
        ("place[profile=fbgemm,bits=4]", "bits=4, but profile fbgemm has 8"),
        ("place[profile=academic,activation_bits=5]", "activation_bits=5, but profile academic has 4, 8, 3, 2"),
        ("place[profile=weight_only,activation_bits=8]", "leaves activations in float"),
        ("place[method=kmeans]", "method 'kmeans' has no option 'symmetric'"),
        ("place[method=rtn[bits=4]]", "bits is decided outside of it"),
    ],
)
def test_what_does_not_go_together_is_said(step: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        _placed(step)


def test_the_profile_is_part_of_a_runs_identity() -> None:
    one, other = (registry.resolve("method", "place", {"profile": name}) for name in ("fbgemm", "tensorrt"))
    assert list(one.files) == ["fbgemm"]
    assert one.files["fbgemm"] != other.files["tensorrt"]
