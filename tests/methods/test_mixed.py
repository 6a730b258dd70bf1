"""Mixed precision: what is chosen, recorded and refused."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qbench import registry
from qbench.analysis.allocation import Budget, allocate
from qbench.analysis.curvature import divergence
from qbench.analysis.sensitivity import rounded, sensitivity
from qbench.data import Batches, Data
from qbench.errors import UserError
from qbench.metrics.coverage import macs
from qbench.quant.layers import named_weight_layers
from qbench.registry import parse, resolve
from qbench.workspace import Workspace


class Noise:
    def __init__(self) -> None:
        self.x = torch.randn(10, 2, 6, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


class Residual(nn.Module):
    """Two layers read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.short = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((self.wide(x) + self.short(x)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def run(reference: str, network: nn.Module, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    records: dict[str, Any] = {}
    batches = Batches(Noise(), torch.device("cpu"), 4)
    data = Data(batches, None, nn.functional.cross_entropy, reference=network, record=records.__setitem__)
    name, written = parse(reference)
    return resolve("method", name, written | options)(copy.deepcopy(network), data), records


def average(network: nn.Module, bits: dict[str, int]) -> float:
    sizes = {name: layer.weight.numel() for name, layer in named_weight_layers(network).items()}
    return sum(sizes[name] * bits[name] for name in sizes) / sum(sizes.values())


@pytest.mark.parametrize("measure", ["kl", "sqnr", "hawq", "fisher"])
@pytest.mark.parametrize("solver", ["milp", "greedy"])
def test_the_budget_is_kept_and_weights_are_the_methods(network, measure, solver):
    model, records = run(f"mixed[bits=4.5,measure={measure},solver={solver}]", network)
    bits = records["mixed_bits"]
    assert 3 < average(network, bits) <= 4.5
    assert records["mixed"]["spent"]["bits"] == pytest.approx(average(network, bits) / 4.5)
    expected, _ = run("rtn[calibration=mse]", network, layer_bits=bits)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@torch.no_grad()
def test_predicted_and_actual_losses_are_recorded(network):
    model, records = run("mixed[bits=4,images=6]", network)
    summary, x = records["mixed"], Noise().x[:6]
    assert summary["actual"] == pytest.approx(float(divergence(model(x), network(x))), rel=1e-4)
    losses = records["mixed_sensitivity"]["losses"]
    predicted = sum(losses[name][str(width)] for name, width in records["mixed_bits"].items())
    assert summary["predicted"] == summary["objective"] == pytest.approx(predicted)
    assert records["mixed_sensitivity"]["images"] == 6


def test_the_methods_own_records_are_those_of_the_final_rounding(network):
    _, records = run("mixed[method=gptq[damp=0.1],bits=4]", network)
    assert set(records["layer_error"]) == set(records["mixed_bits"])


def test_layers_can_be_tied(network):
    _, free = run("mixed[candidates=[8,2],bits=5]", network)
    assert free["mixed_bits"]["wide"] != free["mixed_bits"]["short"]
    _, tied = run("mixed[candidates=[8,2],bits=5,same_input=true]", network)
    assert tied["mixed_bits"]["wide"] == tied["mixed_bits"]["short"]
    _, grouped = run("mixed[candidates=[8,2],bits=5,groups=[[stem,head],[wide,short]]]", network)
    assert grouped["mixed_bits"]["stem"] == grouped["mixed_bits"]["head"]
    assert tied["mixed"]["objective"] >= free["mixed"]["objective"]


def test_bit_operations_are_bounded(network):
    _, records = run("mixed[bits=null,bops=4]", network)
    _, by_layer = macs(network, Noise().x[:1])
    spent = sum(by_layer[name] * width for name, width in records["mixed_bits"].items())
    assert spent <= 4 * sum(by_layer.values())
    assert records["mixed"]["spent"] == {"bops": pytest.approx(spent / 4 / sum(by_layer.values()))}


def test_latencies_come_from_a_table(network, tmp_path):
    file = tmp_path / "times.csv"
    slow = {"stem": 10, "wide": 1, "short": 1, "head": 1}
    rows = [f"{name},{bits},{slow[name] * bits}" for name in slow for bits in (8, 4)]
    file.write_text("\n".join(["layer,bits,latency", *rows]))
    options = {"latency_table": str(file), "candidates": [8, 4], "bits": None}
    _, records = run("mixed", network, latency=64, **options)
    assert records["mixed_bits"] == {"stem": 4, "wide": 8, "short": 8, "head": 8}
    with pytest.raises(UserError, match="budget latency: the cheapest widths cost 52, but 51 is the limit"):
        run("mixed", network, latency=51, **options)
    file.write_text("\n".join(["layer,bits,latency", *rows[:-1]]))
    with pytest.raises(UserError, match="no latency of head at 4 bits"):
        run("mixed", network, latency=64, **options)
    with pytest.raises(UserError, match=r"nothing\.csv"):
        run("mixed", network, latency=64, **options | {"latency_table": str(Path(tmp_path) / "nothing.csv")})


def test_what_is_skipped_stays_float_and_does_not_count(network):
    model, records = run("mixed[bits=8,candidates=[8,4],skip=[stem]]", network)
    assert records["mixed_bits"] == {"wide": 8, "short": 8, "head": 8}
    assert torch.equal(model.stem.weight, network.stem.weight)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mixed[bits=null]", "give a budget"),
        ("mixed[bits=1.5]", "budget bits: the cheapest widths cost"),
        ("mixed[latency=3]", "needs a latency_table"),
        ("mixed[groups=[[stem,tail]]]", "no layer is named 'tail'"),
        ("mixed[method=fold_bn]", "'fold_bn' does not take a bit width for each layer"),
        ("mixed[method=gtpq]", "did you mean 'gptq'"),
        ("mixed[method=rtn[bits=3]]", "bits is decided outside"),
        ("mixed[candidates=[1]]", "option bits=1"),
    ],
)
def test_mistakes_are_named(network, reference, message):
    with pytest.raises(UserError, match=message):
        run(reference, network)


def test_the_source_of_the_rounding_counts():
    reference = resolve("method", *parse("mixed[method=gptq[damp=0.1,act_order=true],candidates=[8,4]]"))
    assert [plugin.name for plugin in reference.plugins] == ["mixed", "gptq"]
    assert resolve("method", *parse(str(reference))) == reference


@torch.no_grad()
def test_better_than_uniform_random_and_reversed(tmp_path):
    """On a real network, at no more bits than uniform rounding has."""
    space = Workspace(
        registry.resolve("dataset", "digits"),
        registry.resolve("model", "digits_resnet"),
        (48, 0),
        tmp_path,
        torch.device("cpu"),
    )
    data, network = space.data(seed=0, trains=False), space.model.load()
    weights = rounded(network, data, resolve("method", "rtn", {"calibration": "mse"}), (4, 3, 2))
    found = sensitivity(network, weights, data, "kl", 16)
    sizes = [weights[3][name].numel() for name in found.layers]
    budget = [Budget("bits", np.outer(sizes, found.bits), 3 * sum(sizes))]
    fresh = space.data(seed=0, trains=False).calibration.source.batch(range(16, 48))
    floats = network(fresh)

    def cost(columns: np.ndarray) -> float:
        changed = copy.deepcopy(network)
        for name, column in zip(found.layers, columns, strict=True):
            changed.get_submodule(name).weight.data = weights[found.bits[column]][name]
        return float(divergence(changed(fresh), floats))

    chosen = cost(allocate(found.losses, budget))
    uniform = cost(np.full(len(sizes), found.bits.index(3)))
    order = np.random.default_rng(0)
    random = [cost(allocate(order.permutation(found.losses), budget)) for _ in range(9)]
    assert chosen < uniform
    assert chosen < np.median(random)
    assert cost(allocate(found.losses, budget, solver="greedy")) < uniform
    assert cost(allocate(-found.losses, budget)) > uniform
