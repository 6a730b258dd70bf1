"""Detectors in real runtimes: the outputs of their heads are those of the network, and decode to the same boxes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qbench import registry
from qbench.data import Batches, Data
from qbench.models.base import Model
from qbench.quant import packing
from qbench.quant.activations import input_quantizers
from qbench.quant.packing import Origin

MODELS = {
    "ssd": "ssd[backbone=test_resnet,classes=3,size=96,maps=4,random=0]",
    "retinanet": "retinanet[backbone=test_resnet,classes=3,size=96,width=16,random=0]",
    "efficientdet": "efficientdet[classes=3,size=128,random=0]",
}


class Images:
    def __init__(self, side: int) -> None:
        self.side = side

    def __len__(self) -> int:
        return 4

    def batch(self, positions: Any) -> Tensor:
        whole = torch.randn(4, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))
        return whole[list(positions)]


SLOW = pytest.param("efficientdet", marks=pytest.mark.slow)


@pytest.fixture(params=["ssd", "retinanet", SLOW], scope="module")
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, nn.Module]:
    """8-bit weights and inputs, batch norms folded, loaded back from the artifact."""
    if request.param == "efficientdet":
        pytest.importorskip("effdet", reason="effdet is not installed (pip install 'qbench[efficientdet]')")
    reference = registry.resolve("model", *registry.parse(MODELS[request.param]))
    model = reference()
    network = model.load()
    data = Data(
        Batches(Images(model.preprocess.size[0]), torch.device("cpu"), 4),
        None,
        model.loss,
        reference=copy.deepcopy(network),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in ("fold_bn", "rtn[bits=8]", "activations[bits=8]"):
            network = registry.resolve("method", *registry.parse(step))(network, data)
    path = tmp_path_factory.mktemp("artifacts") / "a.safetensors"
    packing.pack(network, path, Origin(reference.name, dict(reference.options)))
    return model, packing.load(path)


def same(model: Model, network: nn.Module, found: list[np.ndarray], x: Tensor) -> None:
    """As near as roundings allow that flip when the input changes by a millionth."""
    with torch.no_grad():
        wanted, moved = network(x), network(x * (1 + 1e-6))
    assert model.decode is not None
    for one, other, noisy in zip(found, wanted, moved, strict=True):
        assert one.shape == tuple(other.shape)
        noise = np.linalg.norm(noisy - other)
        assert np.linalg.norm(one - other.numpy()) < 3 * noise + 0.02 * np.linalg.norm(other)
    boxes, expected = model.decode(tuple(map(torch.from_numpy, found)))[0], model.decode(wanted)[0]
    count = min(10, len(expected.scores))
    assert boxes.scores[:count].numpy() == pytest.approx(expected.scores[:count].numpy(), abs=0.02)


def test_onnx(quantized: tuple[Model, nn.Module]) -> None:
    pytest.importorskip("onnxruntime", reason="an optional extra: pip install 'qbench[onnx]'")
    from qbench.runtimes.onnx_graph import INPUT, to_onnx
    from qbench.runtimes.onnxruntime import open_session

    model, network = quantized
    x = Images(model.preprocess.size[0]).batch([0])
    graph = to_onnx(network, x, dynamic=True)
    places = sum(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    assert places >= len(input_quantizers(network))
    found = open_session(graph.SerializeToString(), optimize=False).run(None, {INPUT: x.numpy()})
    same(model, network, found, x)


def test_openvino(quantized: tuple[Model, nn.Module]) -> None:
    pytest.importorskip("openvino", reason="an optional extra: pip install 'qbench[openvino]'")
    model, network = quantized
    x = Images(model.preprocess.size[0]).batch([0])
    compiled = registry.resolve("runtime", "openvino")().compile(network, x, threads=1)
    assert len(compiled.claimed_layers) == len(input_quantizers(network))
    assert compiled.integer_layers > 0.8 * compiled.compute_layers
    same(model, network, compiled.run(x.numpy()), x)
