"""After bias correction every layer's mean output is the float network's."""

import copy
from collections.abc import Sequence

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.methods.bias_correct import bias_correct
from qbench.methods.fold_bn import fold_bn
from qbench.methods.rtn import rtn
from qbench.quant import structure
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, named_weight_layers


class Noise:
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


def data_for(reference: nn.Module | None) -> Data:
    batches = Batches(Noise(), torch.device("cpu"), batch_size=8)
    return Data(batches, None, nn.functional.cross_entropy, reference=reference)


def layer_means(model: nn.Module) -> dict[str, Tensor]:
    means = {}
    handles = [
        layer.register_forward_hook(
            lambda m, _, y, name=name: means.__setitem__(
                name, y.movedim(-1 if isinstance(m, nn.Linear) else 1, 0).flatten(1).mean(1)
            )
        )
        for name, layer in named_weight_layers(model).items()
    ]
    with torch.no_grad():
        model(Noise.x)
    for handle in handles:
        handle.remove()
    return means


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit"])
def test_means_agree_in_every_layer(architecture: str, fold: bool) -> None:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 16} if architecture == "test_vit" else {}
    original = create_model(architecture, **options).eval()
    if fold:
        fold_bn(original, data_for(None))
    model = rtn(copy.deepcopy(original), data_for(original), bits=3)
    bias_correct(model, data_for(original))
    want, got = layer_means(original), layer_means(model)
    for name, mean in want.items():
        torch.testing.assert_close(got[name], mean, rtol=1e-4, atol=1e-5 * (1 + float(mean.abs().max())))
    fresh = create_model(architecture, **options).eval()
    structure.replay(fresh, structure.record(model))
    fresh.load_state_dict(model.state_dict())


def test_transposed_convolutions_are_corrected() -> None:
    original = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2, bias=False)).eval()
    model = copy.deepcopy(original)
    encode(model[0], Affine.nearest(model[0].weight, 0.1, bits=3, axis=1))
    bias_correct(model, data_for(original))
    torch.testing.assert_close(layer_means(model)["0"], layer_means(original)["0"], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_done_is_said() -> None:
    model = create_model("test_resnet").eval()
    with pytest.raises(Unsupported, match="float network"):
        bias_correct(model, data_for(None))
    with pytest.raises(Unsupported, match="no layer"):
        bias_correct(model, data_for(create_model("test_efficientnet").eval()))
    encode(model.fc, Affine.nearest(model.fc.bias, 0.1, bits=8), "bias")
    with pytest.raises(Unsupported, match="bias of fc is quantized"):
        bias_correct(model, data_for(create_model("test_resnet").eval()))
