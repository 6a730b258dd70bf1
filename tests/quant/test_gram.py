"""Rows of a layer's input, against the layer itself and against torch.nn.functional.unfold."""

import pytest
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.gram import Sampling, check_rows, grams, grouped_weight, windows


class Asymmetric(nn.Conv2d):
    """Pads one side only, in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (9, 8)),
    "strided": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0)), (9, 8)),
    "pointwise": (nn.Conv2d(4, 6, 1, bias=False), (5, 7)),
    "pointwise strided": (nn.Conv2d(4, 6, 1, stride=2), (5, 7)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding=2), (9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (9, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (9, 8)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same"), (9, 8)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (9, 8)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (9, 8)),
    "circular same": (nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"), (9, 8)),
    "timm same": (Conv2dSame(4, 6, 3, stride=2), (10, 7)),
    "timm same dilated": (Conv2dSame(4, 6, 3, dilation=2, groups=2), (10, 7)),
    "one dimension": (nn.Conv1d(4, 6, 3, padding=1), (9,)),
    "three dimensions": (nn.Conv3d(4, 6, (1, 3, 2), padding=(0, 1, 1)), (3, 5, 4)),
}


def by_hand(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of the (positions, groups, d) rows, and what they give times the weight."""
    view = windows(layer, x)
    rows = view.reshape(-1, grouped_weight(layer).shape[0], grouped_weight(layer).shape[2])
    return torch.einsum("mgi,mgj->gij", rows, rows), torch.einsum("mgd,gnd->mgn", rows, grouped_weight(layer))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_rows_times_weight_is_the_output(name: str, memory: torch.memory_format) -> None:
    layer, size = LAYERS[name]
    x = torch.randn(3, 4, *size)
    x = x.to(memory_format=memory) if x.dim() == 4 else x
    check_rows(layer, x)
    gram, product = by_hand(layer, x)
    output = (layer(x) - (0 if layer.bias is None else layer.bias.reshape(-1, *[1] * len(size)))).movedim(1, -1)
    torch.testing.assert_close(product.flatten(1), output.reshape(-1, output.shape[-1]), rtol=1e-4, atol=1e-5)
    sums = grams(layer, [x[:1], x[1:]], [x[:1] * 2, x[1:] * 2])
    torch.testing.assert_close(sums.H, gram.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.G, 2 * sums.H, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.F, 4 * sums.H, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.float_mean, 2 * sums.mean)


def test_rows_are_ordered_as_unfold_orders_them() -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1, stride=2), torch.randn(2, 4, 7, 7)
    unfolded = nn.functional.unfold(x, 3, padding=1, stride=2).mT.flatten(0, 1)
    assert torch.equal(windows(layer, x).reshape(-1, 36), unfolded)


def test_linear_layers_take_any_leading_dimensions() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(2, 7, 4, 5)
    torch.testing.assert_close(
        grams(layer, [x]).H[0], (x.reshape(-1, 5).T @ x.reshape(-1, 5)).double(), rtol=1e-5, atol=1e-4
    )
    assert grams(layer, [torch.randn(4, 5)]).rows == 4


def test_wide_layers_are_symmetric_across_blocks() -> None:
    layer, x, y = nn.Linear(1100, 2), torch.randn(30, 1100), torch.randn(30, 1100)
    sums = grams(layer, [x], [y])
    for got, want in ((sums.H, x.T @ x), (sums.G, x.T @ y), (sums.F, y.T @ y)):
        torch.testing.assert_close(got[0], want.double(), rtol=1e-4, atol=1e-3)


def test_large_inputs_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(5, 4, 9, 9)
    whole = grams(layer, [x]).H
    monkeypatch.setattr("qbench.quant.gram._CHUNK", 1)
    torch.testing.assert_close(grams(layer, [x]).H, whole, rtol=1e-5, atol=1e-4)


def test_sampled_positions_are_the_same_in_both_networks_and_for_a_seed() -> None:
    layer, x = nn.Conv2d(4, 6, 3, groups=2), torch.randn(6, 4, 32, 32)
    some = grams(layer, [x[:3], x[3:]], [x[:3], x[3:]], Sampling(rows=600, seed=1))
    assert some.rows == 600
    torch.testing.assert_close(some.H, some.G)
    assert torch.equal(some.H, grams(layer, [x[:3], x[3:]], [x[:3], x[3:]], Sampling(rows=600, seed=1)).H)
    assert not torch.equal(some.H, grams(layer, [x[:3], x[3:]], sampling=Sampling(rows=600, seed=2)).H)
    whole = grams(layer, [x])
    assert (some.H / some.rows - whole.H / whole.rows).abs().max() < 0.2


def test_patches_of_the_reference_code() -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 32, 32)
    # 11 x 11 patches that do not overlap, of which int(0.25 * 121 + 1) are drawn.
    assert grams(layer, [x], sampling=Sampling(stride="kernel", retain=0.25)).rows == 2 * 31
    assert windows(layer, x, "kernel").shape == (2, 11, 11, 4, 3, 3)


def test_double_inputs_keep_their_precision() -> None:
    layer, x = nn.Linear(5, 3).double(), torch.randn(8, 5, dtype=torch.float64)
    torch.testing.assert_close(grams(layer, [x]).H[0], x.T @ x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layer", [StdConv2d(4, 6, 3), Asymmetric(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)])
def test_layers_that_do_something_else_are_refused(layer: nn.Module) -> None:
    with pytest.raises(Unsupported):
        grams(layer, [torch.randn(2, 4, 8, 8)])
