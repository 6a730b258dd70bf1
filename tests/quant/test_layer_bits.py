"""Bit widths of single layers, as every method that has the option understands them."""

import pytest
from torch import nn

from qbench import registry
from qbench.errors import UserError
from qbench.quant.layers import select_layers

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
