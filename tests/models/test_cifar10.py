import pytest
import torch
from torch import nn

from qbench.registry import get


@pytest.mark.parametrize(("name", "sides"), [("cifar10_resnet", [32, 16, 8, 4]), ("cifar10_mobilenet", [32, 16, 8, 4])])
def test_small_networks_that_keep_the_resolution(name: str, sides: list[int]) -> None:
    model = get("model", name)()
    network = model.build().eval()
    seen: list[int] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[-1]))
    with torch.no_grad():
        assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert list(dict.fromkeys(side for side in seen if side > 1)) == sides
    assert sum(4 * value.numel() for value in network.state_dict().values()) < 3e6
    assert model.preprocess.size == (32, 32)
