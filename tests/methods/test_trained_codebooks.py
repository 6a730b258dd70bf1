"""Weights of few levels that are trained: accuracy, levels, zeros and bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from embedded import Digits

from qbench.methods.kmeans import kmeans
from qbench.methods.kmeans_finetune import kmeans_finetune
from qbench.methods.prune import prune
from qbench.quant.audit import audit
from qbench.quant.encodings import Codebook
from qbench.quant.layers import encodings
from qbench.quant.packing import Origin, pack
from qbench.quant.schedule import Schedule


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits("digits_resnet", tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize(
    ("method", "options", "levels"),
    [
        ("ternary", {}, 3),
        ("ternary", {"kind": "ttq", "steps": 25}, 3),
        ("kmeans_finetune", {"bits": 2}, 4),
        ("kmeans_finetune", {"bits": 2, "assignments": "redone"}, 4),
        ("deep_compression", {"steps": 20}, 32),
    ],
)
def test_few_levels_keep_most_of_the_accuracy(digits: Digits, method: str, options: Any, levels: int) -> None:
    network = digits.trained(method, **{"steps": 12, "batch_size": 32} | options)
    assert digits.accuracy(network) > 0.75 * digits.accuracy(digits.space.model.load().eval())
    assert digits.records[method]["deployed_difference"] <= 1e-6
    declared = [entry["levels"] for entry in audit(network).values()]
    assert declared == [declared[0], *[levels] * (len(declared) - 2), 256]


def test_training_levels_mends_what_k_means_breaks(digits: Digits) -> None:
    model = digits.space.model.load().eval()
    data = digits.space.data(seed=0, trains=False)
    clustered = digits.accuracy(kmeans(model, data, bits=2, start="linear", edge_bits=8))
    assert digits.accuracy(digits.trained("kmeans_finetune", bits=2, steps=12, batch_size=32)) > clustered + 0.1


def test_levels_of_a_pruned_network_are_trained_without_its_zeros(digits: Digits) -> None:
    data = digits.space.data(seed=0, trains=True)
    model = prune(digits.space.model.load().eval(), data, sparsity=0.5)
    zeros = {name: parameter == 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}
    network = kmeans_finetune(model, data, bits=3, assignments="redone", schedule=Schedule(steps=2, batch_size=8))
    assert all(not network.get_parameter(name)[zero].any() for name, zero in zeros.items())


def test_deep_compression_is_small_and_keeps_its_zeros(digits: Digits, tmp_path: Path) -> None:
    network = digits.trained("deep_compression", steps=2, batch_size=8, sparsity=0.8, bits=4)
    for name, encoding in encodings(network).items():
        assert isinstance(encoding, Codebook)
        assert encoding.coder == "huffman"
        assert (network.get_parameter(name) == 0).float().mean() >= 0.79
    weights = sum(encoding.codes.numel() for encoding in encodings(network).values())
    sizes = pack(network, tmp_path / "a.safetensors", Origin("none", {}))
    coded = sum(len(e.tensors()["codes"]) for e in encodings(network).values())
    # One bit for a zero, and at most one more than log2(15) for one of 15 levels.
    assert coded * 8 / weights < 0.8 + 0.2 * 4.91
    assert sizes.packed_bytes < weights * 4 / 10


def test_weights_train_before_they_are_clustered(digits: Digits) -> None:
    late, early = (digits.trained("deep_compression", steps=4, batch_size=8, retraining=r) for r in (1.0, 0.0))
    a, b = (encodings(network)["layer1.0.conv1.weight"] for network in (late, early))
    assert isinstance(a, Codebook)
    assert isinstance(b, Codebook)
    assert not torch.equal(a.levels, b.levels)
