"""The sweep sees what re-running every prefix would see, whatever the network's control flow is."""

import copy
import math
import warnings

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from qbench.errors import Unsupported, UserError
from qbench.quant import paging
from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.sweep import sweep


def images(batches: int = 3, size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, size, size, generator=generator) for _ in range(batches)]


def coarsen(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.copy_((layer.weight * 8).round() / 8)


def rerun(model: nn.Module, name: str, batches: list[Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return seen


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "test_vit"])
def test_equals_running_each_prefix_again(architecture: str) -> None:
    torch.manual_seed(0)
    size = 64 if architecture == "test_vit" else 32
    model = create_model(architecture, **({"img_size": 64} if size == 64 else {})).eval()
    original, batches = copy.deepcopy(model), images(size=size)
    stops = 0
    for stop in sweep(model, batches):
        expected, floats = rerun(model, stop.name, batches), rerun(original, stop.name, batches)
        for got, want in zip([*stop.inputs, *stop.reference_inputs], expected + floats, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        coarsen(stop.layer)
        stops += 1
    assert stops == len([m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
    for name, parameter in original.named_parameters():
        assert parameter.grad_fn is None, name


def inputs_of(model: nn.Module, batches: list[Tensor], budget: int | None) -> list[Tensor]:
    seen = []
    for stop in sweep(model, batches, budget=budget):
        seen += [x.clone() for x in stop.inputs] + [x.clone() for x in stop.reference_inputs]
        coarsen(stop.layer)
    return seen


def test_a_tiny_budget_changes_nothing_but_where_activations_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pagers: list[paging.Pager] = []
    close = paging.Pager.close
    monkeypatch.setattr(paging.Pager, "close", lambda self: (pagers.append(self), close(self))[1])
    model = create_model("test_resnet").eval()
    free = inputs_of(copy.deepcopy(model), images(), None)
    tight = inputs_of(copy.deepcopy(model), images(), 100_000)
    assert pagers[0].spilled == 0
    assert pagers[1].spilled > 1_000_000
    assert all(torch.equal(a, b) for a, b in zip(free, tight, strict=True))


def test_an_input_that_is_held_is_not_moved_away() -> None:
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(5)]).eval()
    held, copies = [], []
    for stop in sweep(model, images(), budget=0):
        for x in stop.inputs:
            held.append(x)
            copies.append(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


class Caching(nn.Module):
    """Keeps a table made in the first forward pass, as detectors keep anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.full((1, 3, 32, 32), 2.0) * 1
        return self.second(self.first(x) * self.table)


def test_a_table_that_forward_passes_share_survives_the_file() -> None:
    model = Caching().eval()
    inputs_of(model, images(), 0)
    assert model.table is not None
    assert torch.equal(model.table, torch.full((1, 3, 32, 32), 2.0))


class Branching(nn.Module):
    """Batches with a positive first pixel skip a layer or take two of them the other way round."""

    def __init__(self, swap: bool) -> None:
        super().__init__()
        self.swap = swap
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        positive = bool(x[0, 0, 0, 0] > 0)
        x = self.a(x)
        if not positive:
            return self.c(self.b(x))
        return self.b(self.c(x)) if self.swap else self.c(x)


@pytest.mark.parametrize("swap", [False, True])
def test_batches_that_go_other_ways_do_not_block(swap: bool) -> None:
    batches = images(4)
    for sign, batch in zip([1, -1, 1, -1], batches, strict=True):
        batch[0, 0, 0, 0] = sign
    counts = {stop.name: len(stop.inputs) for stop in sweep(Branching(swap).eval(), batches)}
    assert counts == {"a": 4, "b": 2, "c": 4}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.idle, self.tied = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.tied.weight, self.tied.bias = self.shared.weight, self.shared.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.shared(self.shared(x)))


def test_layers_that_are_used_twice_or_never_are_told() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = [stop.name for stop in sweep(Twice().eval(), images())]
    told = " | ".join(str(warning.message) for warning in caught)
    assert names == ["shared"]
    assert told.count("shared is called more than once") == 1
    assert "tied has the weight of shared" in told
    assert "no calibration batch comes by idle" in told


def test_inputs_are_behind_the_input_quantizer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    quantize_input(model[1], StaticQuantizer(bits=3, scale=0.5, zero_point=4))
    model.eval()
    original = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    original.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    stop = list_at(sweep(model, images(), reference=original), "1")
    assert set(stop[0].unique().tolist()) <= {0.5 * k for k in range(-4, 4)}
    assert stop[1].unique().numel() > 100


def list_at(stops, name: str) -> tuple[Tensor, Tensor]:
    for stop in stops:
        if stop.name == name:
            return stop.inputs[0].clone(), stop.reference_inputs[0].clone()
    raise AssertionError(name)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_leaving_early_and_errors_clean_up() -> None:
    model = create_model("test_resnet").eval()
    for _ in sweep(model, images()):
        break
    assert hooks(model) == 0

    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self[0](x)
            raise RuntimeError("broken on purpose")

    broken = Broken(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)).eval()
    with pytest.raises(RuntimeError, match="broken on purpose"):
        list(sweep(broken, images()))
    assert hooks(broken) == 0


def test_a_network_can_be_swept_without_the_float_one() -> None:
    model = create_model("test_resnet").eval()
    for stop in sweep(model, images(), walk_reference=False):
        assert len(stop.inputs) == 3
        assert len(stop.reference_inputs) == 0


def test_blocks_can_be_stops_and_their_inputs_can_be_trained_on() -> None:
    model = create_model("test_resnet").eval()
    names = ["layer1", "layer3"]
    for stop in sweep(model, images(), layers=names):
        loss = stop.layer(stop.inputs[0]).square().mean()
        loss.backward()
        assert stop.name == names[stop.index]


def test_what_is_wrong_is_said() -> None:
    model = create_model("test_resnet").eval()
    with pytest.raises(UserError, match="evaluation mode"):
        sweep(create_model("test_resnet").train(), images())
    with pytest.raises(Unsupported, match="no layer"):
        list(sweep(model, images(), reference=nn.Sequential().eval()))
    kept = [stop.inputs for stop in sweep(model, images())]
    with pytest.raises(RuntimeError, match="moved on"):
        kept[0][0]


def test_a_view_that_needs_the_plain_layout_works() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 2, 1), nn.Linear(2 * 32 * 32, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head(x.view(x.shape[0], -1))

    assert [stop.name for stop in sweep(Flat().eval(), images())] == ["conv", "head"]


def test_the_budget_follows_the_limit_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "_limit", math.inf)
    cpu = torch.device("cpu")
    free = paging.available(cpu)
    paging.limit_memory(1 << 40)
    assert paging.available(cpu) <= 1 << 40
    paging.limit_memory(1)
    assert paging.available(cpu) == 0 < free
