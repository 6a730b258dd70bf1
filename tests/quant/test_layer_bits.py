"""Bit widths of single layers, as every method that has the option understands them."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from qbench import registry
from qbench.data import Batches, Data
from qbench.errors import UserError
from qbench.quant.layers import encodings, select_layers

MODEL = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))


def widths(**options: object) -> dict[str, int]:
    return {name: width for name, _, width in select_layers(MODEL, 4, **options)}


def test_the_longest_name_counts() -> None:
    assert widths(layer_bits={"1": 6, "1.1": 3}) == {"0": 4, "1.0": 6, "1.1": 3, "2": 4}
    assert widths(layer_bits={"1.1": 3, "1": 6}) == {"0": 4, "1.0": 6, "1.1": 3, "2": 4}


def test_it_goes_before_edges_and_after_skipped_layers() -> None:
    assert widths(layer_bits={"0": 2, "1": 32}, edge_bits=8) == {"0": 2, "2": 8}
    assert widths(layer_bits={"0": 2}, skip=("0",)) == {"1.0": 4, "1.1": 4, "2": 4}


def test_a_name_that_no_layer_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"layer_bits: no layer is named '1\.2'"):
        widths(layer_bits={"1.2": 4})


def test_it_is_written_in_a_reference() -> None:
    name, options = registry.parse("gpfq[bits=4,layer_bits={conv_stem: 8, blocks.0: 6}]")
    reference = registry.resolve("method", name, options)
    assert reference.options["layer_bits"] == {"conv_stem": 8, "blocks.0": 6}
    assert registry.parse(str(reference)) == (name, options)


@pytest.mark.parametrize("name", ["rtn", "kmeans", "lloyd_max", "pot", "apot", "quantile", "log2", "ecsq"])
def test_methods_without_data_take_it(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 6), nn.Linear(6, 40), nn.Linear(40, 8)).eval()
    method = registry.resolve("method", name, {"bits": 4, "layer_bits": {"0": 32, "1": 2}})
    found = encodings(method(model, Data(Batches(Images(), torch.device("cpu")), None, nn.functional.cross_entropy)))
    assert found.keys() == {"1.weight", "2.weight"}
    width = {key: code.nominal_bits / code.decode().numel() for key, code in found.items()}
    assert width["1.weight"] < 2.6 < width["2.weight"]


class Images:
    def __len__(self) -> int:
        return 4

    def batch(self, positions: Sequence[int]) -> Tensor:
        return torch.randn(len(positions), 40, generator=torch.Generator().manual_seed(0))
