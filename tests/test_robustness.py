"""Every method on networks that are unlike what it was written for: it works, or says which layer it cannot do."""

from __future__ import annotations

import copy
import functools
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from odd import NETWORKS, Branches
from test_conformance import CASES
from torch import Tensor, nn

import qbench
from qbench import registry
from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.models.base import cross_entropy
from qbench.quant import packing
from qbench.quant.activations import input_quantizers
from qbench.quant.layers import encodings, named_weight_layers
from qbench.registry import Reference
from qbench.workspace import differences

AFTER = {"compress": "rtn", "bias_correct": "rtn"}
"""What is run before the steps that follow others."""
PATCHES = {"adaround", "gpfq", "gptq", "msq_preprocess", "obq", "product", "spfq"}
"""Methods that look at a layer's input patches."""
TRANSFORMERS = {"ptq4vit", "repq_vit"}
"""Methods that quantize attention."""
TOOLKITS = {"brevitas", "nncf_ptq", "ort_static", "torchao_pt2e"}
"""Methods of others, which may fail in their own way."""
REFUSED = {
    "transposed": (PATCHES, r"body\.1: .*ConvTranspose2d.*skip=\[body\.1\]"),
    "half": ({"adaquant"}, r"net\.body\.0 is float16"),
    "bfloat16": ({"adaquant"}, r"net\.body\.0 is bfloat16"),
}
"""The combinations that are not supported, and what is said about them."""
SAME = {"half": 1e-3, "bfloat16": 1e-2}


def refusal(case: str, kind: str) -> str | None:
    """What the combination is refused with, if it is not supported."""
    if "matmuls=true" in case or resolve(case).name in TRANSFORMERS:
        return "the attention mix" if kind == "attention" else "the model multiplies no activations"
    if resolve(case).name == "head_bits":
        return "the network has no heads"
    if "measure=fisher" in case and kind == "one layer":
        return "measure fisher draws from class scores"
    methods, reason = REFUSED.get(kind, (set(), ""))
    method = resolve(case)
    return reason if methods & {method.name, method.options.get("method")} else None


class Noise:
    def __init__(self, images: int) -> None:
        self.x = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


def images(kind: str) -> Noise:
    return Noise(1 if kind == "one sample" else 4)


@functools.cache
def odd(kind: str) -> nn.Module:
    return registry.resolve("model", "odd", {"kind": kind})().load()


def resolve(case: str) -> Reference:
    return registry.resolve("method", *registry.parse(case))


def applicable(case: str, kind: str) -> bool:
    """Training is not for these networks, and tokens need a linear layer."""
    return resolve(case).plugin.attributes["track"] != "qat" and not (kind == "one layer" and "token" in case)


COMBINATIONS = [(case, kind) for case in CASES for kind in NETWORKS if applicable(case, kind)]


@pytest.mark.parametrize(("case", "kind"), COMBINATIONS)
def test_it_works_or_says_why(case: str, kind: str, tmp_path: Path) -> None:
    method, original, x = resolve(case), odd(kind), images(kind).x
    reference, records = copy.deepcopy(original), {}
    # Frozen, as networks are that somebody took from elsewhere to use, not to train.
    model = copy.deepcopy(original).requires_grad_(False)
    batches = Batches(images(kind), torch.device("cpu"), batch_size=2)
    data = Data(batches, None, cross_entropy, reference=reference, record=records.__setitem__)
    if method.name in AFTER:
        model = resolve(AFTER[method.name])(model, data)
    reason = refusal(case, kind)
    if reason is not None:
        with pytest.raises(Unsupported, match=f"^{reason}"):
            method(model, data)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = method(model, data)
        except Exception as error:
            if method.name in TOOLKITS:
                assert_its_own(error)
                return
            raise
    answers, wanted = model(x), original(x)
    assert answers.shape == wanted.shape
    assert answers.isfinite().all()
    if method.plugin.attributes["track"] == "structure" and method.name not in AFTER:
        assert (answers - wanted).abs().max() <= SAME.get(kind, 1e-5) * wanted.abs().max()
    assert not differences(reference, original)
    left = unquantized(model)
    told = f"{[str(warning.message) for warning in caught]} {records}"
    assert not left or all(name in told for name in left), f"nothing is said about {left}"
    origin = packing.Origin("odd", {"kind": kind})
    packing.pack(model, tmp_path / "model.safetensors", origin, original.state_dict())
    loaded = packing.load(tmp_path / "model.safetensors")
    assert not differences(model, loaded)
    assert torch.equal(loaded(x), answers)


@pytest.mark.parametrize("case", [case for case in CASES if applicable(case, "plain") and not refusal(case, "plain")])
def test_statistics_of_batch_norms_stay_even_in_training_mode(case: str) -> None:
    original, statistics = odd("plain"), ["running_mean", "running_var", "num_batches_tracked"]
    model = copy.deepcopy(original).train()
    data = Data(Batches(images("plain"), torch.device("cpu")), None, cross_entropy, reference=copy.deepcopy(original))
    method = resolve(case)
    if method.name in AFTER:
        model = resolve(AFTER[method.name])(model, data)
    try:
        state = method(model, data).state_dict()
    except Unsupported as error:
        assert method.name in TOOLKITS
        assert_its_own(error)
        return
    left = [key for key in original.state_dict() if key.rpartition(".")[2] in statistics and key in state]
    assert left or method.name in {"fold_bn", *TOOLKITS}
    assert all(torch.equal(state[key], original.state_dict()[key]) for key in left)


def assert_its_own(error: Exception) -> None:
    """A toolkit cannot do it, and says so, or its code fails; that it is not installed skips the test."""
    if isinstance(error, Unsupported):
        if "is not installed" in str(error):
            pytest.skip(str(error))
        return
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if Path(qbench.__file__).parent in place.parents:
        raise error


def unquantized(model: nn.Module) -> list[str]:
    """The layers without an encoding, where others have one; without an input quantizer, where others have one."""
    layers = named_weight_layers(model)
    coded = {id(model.get_parameter(name)) for name in encodings(model)}
    quantizers = input_quantizers(model)
    return [
        name
        for name, layer in layers.items()
        if (coded and id(layer.weight) not in coded) or (quantizers and name not in quantizers)
    ]


def test_images_take_different_ways_through_the_network_that_branches() -> None:
    model, seen = odd("branches"), []
    assert isinstance(model, Branches)
    handles = [
        getattr(model, name).register_forward_pre_hook(lambda _, args, name=name: seen.append((name, len(args[0]))))
        for name in ("rare", "shrink")
    ]
    batches = images("branches").x.split(2)
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    rare = sum(count for name, count in seen if name == "rare")
    assert 0 < rare < 4
    assert len([name for name, _ in seen if name == "shrink"]) == len(batches) + 1


@pytest.mark.parametrize("case", ["rtn", "gpfq", "cast", "activations"])
def test_a_weight_that_is_computed_is_refused_by_name(case: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 2, 1))).eval()
    data: Any = Data(Batches(Noise(2), torch.device("cpu")), None, cross_entropy, reference=copy.deepcopy(model))
    with pytest.raises(Unsupported, match=r"^1 computes its weight .*skip=\[1\]"):
        resolve(case)(model, data)
