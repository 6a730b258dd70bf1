"""Product quantization: centroids, the metric that errors are measured by, and layers."""

import numpy as np
import pytest
import torch
from torch import nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.quant import clustering
from qbench.quant.encodings import VectorCodebook
from qbench.quant.layers import encodings, weight_layers
from qbench.quant.vectors import _assign, _solve, cluster
from qbench.registry import parse, resolve


class Images:
    def __init__(self, count=16):
        self.x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.x[:, 0] *= 5
        self.x[:, 2] = 0  # a dead channel

    def __len__(self):
        return len(self.x)

    def batch(self, positions):
        return self.x[list(positions)]


def data(count=16):
    records = {}
    found = Data(Batches(Images(count), torch.device("cpu"), 8), None, None, record=records.__setitem__)
    found.records = records
    return found


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 30, 1), nn.Flatten(),
        nn.Linear(480, 10),
    ).eval()  # fmt: skip


def run(reference, model, data):
    return resolve("method", *parse(reference))(model, data)


def metrics(blocks, g, seed=0):
    root = torch.randn(blocks, g, g, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT + 0.01 * torch.eye(g, dtype=torch.float64)


def test_objective_never_grows():
    torch.manual_seed(0)
    found = cluster(torch.randn(6, 50, 4), metrics(6, 4), 16, iterations=60)
    assert len(found.objectives) > 5
    assert (np.diff(found.objectives) <= 1e-9 * found.objectives[0]).all()


def test_steps_are_optimal():
    torch.manual_seed(0)
    vectors, metric = torch.randn(3, 20, 4).double(), metrics(3, 4)
    centroids = torch.randn(5, 4).double()
    codes, costs = _assign(vectors, metric, centroids)
    apart = vectors[:, :, None] - centroids
    direct = torch.einsum("bnki,bij,bnkj->bnk", apart, metric, apart)
    assert torch.equal(codes, direct.argmin(-1))
    assert torch.allclose(costs, direct.min(-1).values)
    best = _solve(vectors, metric, codes, centroids).requires_grad_()
    chosen = vectors - best[codes]
    torch.einsum("bni,bij,bnj->", chosen, metric, chosen).backward()
    assert best.grad.abs().max() < 1e-9


def test_vectors_of_one_weight_are_kmeans():
    torch.manual_seed(0)
    points = torch.randn(400)
    found = cluster(points.view(1, -1, 1), torch.ones(1, 1, 1), 8, iterations=300)
    ordered = points.double().sort().values[None].numpy()
    levels = found.centroids.flatten().sort().values
    # A fixed point of Lloyd's algorithm, not much worse than the optimum.
    assert np.allclose(clustering.lloyd(ordered, levels.numpy()[None]), levels.numpy()[None], atol=1e-9)
    best = clustering.kmeans(points[None], 8)[0]
    optimum = (points[:, None] - best).square().min(1).values.sum()
    assert optimum <= found.objectives[-1] * (1 + 1e-6) < 1.3 * optimum


def test_as_many_centroids_as_vectors():
    torch.manual_seed(0)
    distinct = torch.randn(7, 3)
    vectors = distinct[torch.randint(0, 7, (2, 40))]
    assert cluster(vectors, metrics(2, 3), 12).objectives[-1] < 1e-9
    assert cluster(torch.zeros(2, 3, 4), metrics(2, 4), 3).objectives[-1] == 0


@pytest.mark.parametrize("options", ["", "weighting=none", "dimension=5", "dimension=1,bits=3", "edge_bits=2"])
def test_layers(options):
    model, calibration = net(), data()
    model = run(f"product[{options}]" if "bits=3" in options else f"product[bits=4,{options}]", model, calibration)
    found = encodings(model)
    assert all(isinstance(code, VectorCodebook) for code in found.values())
    g = {"dimension=5": [5, 5, 5, 5], "dimension=1,bits=3": [1, 1, 1, 1]}.get(options, [9, 9, 4, 4])
    assert [code.centroids.shape[1] for code in found.values()] == g
    most = 8 if "bits=3" in options else 16
    # 32 vectors of the depthwise convolution have 8 centroids.
    assert all(len(c.centroids) <= min(most, c.codes.numel() // 4) for c in found.values())
    if options == "edge_bits=2":
        assert [len(c.centroids) for c in found.values()] == [4, 8, 16, 4]
    assert set(calibration.records["product"]["error"]) == {"0", "2", "3", "5"}
    assert all(0 < error < 1 for error in calibration.records["product"]["error"].values())


def output_error(weighting):
    model, before = nn.Sequential(nn.Conv2d(3, 64, 3)).eval(), nn.Sequential(nn.Conv2d(3, 64, 3)).eval()
    torch.manual_seed(1)
    nn.init.normal_(before[0].weight)
    model.load_state_dict(before.state_dict())
    run(f"product[bits=4,dimension=9,weighting={weighting}]", model, data())
    x = Images().x
    with torch.no_grad():
        return float((model(x) - before(x)).square().mean())


def test_inputs_decide_what_matters():
    assert output_error("activations") < 0.9 * output_error("none")


def test_what_has_no_patches():
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 3)).eval()
    with pytest.raises(Unsupported, match=r"skip=\[0\]"):
        run("product", model, data())
    (code,) = encodings(run("product[weighting=none,bits=2]", model, data())).values()
    assert (code.axis, tuple(code.codes.shape)) == (1, (8, 3))


def test_pruned_layers_are_refused():
    with pytest.raises(Unsupported, match="zeros of prune"):
        run("product[bits=2]", run("prune", net(), data()), data())


def test_one_image_and_half_precision():
    assert run("product[bits=2]", net(), data(1))[5].weight.isfinite().all()
    model = run("product[weighting=none,bits=2]", net().half(), data())
    assert all(layer.weight.dtype == torch.float16 for layer in weight_layers(model))
