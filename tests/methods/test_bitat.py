"""BiTAT-style training: accuracy, order, and what the artifact holds."""

import copy
from typing import Any

import pytest
import torch
from embedded import Digits
from test_lsq import make_data
from torch import nn

from qbench.errors import Unsupported
from qbench.methods import bitat as module
from qbench.quant.audit import audit
from qbench.quant.encodings import Rotated, Sum
from qbench.quant.layers import encodings
from qbench.quant.schedule import Schedule


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits("digits_resnet", tmp_path_factory.mktemp("digits"))


def test_binary_weights_in_another_basis_keep_most_of_the_accuracy(digits: Digits) -> None:
    network = digits.trained("bitat", steps=25, batch_size=32)
    assert digits.accuracy(network) > 0.75 * digits.accuracy(digits.space.model.load().eval())
    assert digits.records["bitat"]["deployed_difference"] < 1e-4
    for name, encoding in list(encodings(network).items())[1:-1]:
        assert isinstance(encoding, Sum), name
        assert all(isinstance(part, Rotated) for part in encoding.parts)
        kept, *signs = (entry["levels"] for key, entry in audit(network).items() if key.startswith(f"{name}["))
        assert (kept, set(signs)) == (255, {2})


def network() -> nn.Module:
    inner = [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *inner, nn.Flatten(), nn.Linear(400, 4)).eval()


def test_layers_begin_one_after_the_other_in_the_order_of_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    rotate = module._rotate

    def watched(model: nn.Module, name: str, data: Any) -> None:
        assert not any(model.get_submodule(other).parametrizations.weight[0].waiting for other in begun)
        before = [m.training for m in model.modules()]
        rotate(model, name, data)
        assert before == [m.training for m in model.modules()]
        begun.append(name)

    monkeypatch.setattr(module, "_rotate", watched)
    data, _, _ = make_data()
    module.bitat(network(), data, schedule=Schedule(steps=4, batch_size=8))
    assert begun == ["2", "4"]


def test_the_basis_is_that_of_the_quantized_inputs() -> None:
    """In which they are not correlated, block by block."""
    data, corners, _ = make_data()
    model = module.bitat(network(), data, share=0.0, schedule=Schedule(steps=4, batch_size=8, lr=1e-9))
    encoding = encodings(model)["2.weight"]
    assert isinstance(encoding, Sum)
    basis = torch.cat([part.matrix for part in encoding.parts], 2)
    x = model[2].input_quantizer(model[1](model[0](corners.images[:64])))
    patches = nn.functional.unfold(x, 3).movedim(1, 2).reshape(-1, 4, 9)
    for block in range(len(basis)):
        projected = patches[:, block] @ basis[block]
        gram = projected.T @ projected
        assert (gram - gram.diag().diag()).norm() < 0.02 * gram.norm()


def test_what_is_not_supported_is_said() -> None:
    data, _, _ = make_data()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Flatten(), nn.Linear(1024, 4))
    with pytest.raises(Unsupported, match=r"1 is a transposed convolution: .*skip=\[1\]"):
        module.bitat(copy.deepcopy(model), data)
