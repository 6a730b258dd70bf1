"""Networks whose weights and inputs are signs, but for the first and the last layer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.binary import BinaryWeight
from qbench.quant.calls import Args, first_of, watch_calls
from qbench.quant.fakequant import LearnedWeight, reached
from qbench.quant.layers import select_layers
from qbench.quant.shortcut_plan import ShortcutPlan

EdgeBits = Annotated[int, Field(ge=2, le=8)] | Literal[32] | None
"""Option type: bits of the first and the last layer; None makes them signs as well, 32 leaves them in float."""


def weight_of_bits(weight: Tensor, bits: int, axis: int) -> nn.Module:
    """The quantizer of a weight: signs for one bit, else LSQ with a step for each output channel."""
    return BinaryWeight(axis) if bits == 1 else LearnedWeight(weight, bits, "channel", axis)


def one_bit_layers(model: nn.Module, example: Tensor, edge_bits: int | None, skip: tuple[str, ...]) -> list[str]:
    """The names of the layers whose weights and inputs are to be signs."""
    calls = reached(model, example)
    chosen = select_layers(model, 1, edge_bits, skip, for_inputs=True)
    return [name for name, _, bits in chosen if bits == 1 and name in calls]


def channel_axis_of(model: nn.Module, example: Tensor, layers: list[str]) -> int:
    """The axis that counts channels in the inputs of all these layers.

    Raises:
        Unsupported: there are convolutions as well as linear layers whose input is more than a matrix.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    tokens: set[str] = set()

    def see(name: str, args: Args, kwargs: dict[str, Any]) -> None:
        if isinstance(modules[name], nn.Linear) and first_of(args, kwargs).dim() > 2:
            tokens.add(name)

    watch_calls(model, example, modules, see)
    others = [name for name, module in modules.items() if not isinstance(module, nn.Linear)]
    if tokens and others:
        raise Unsupported(
            f"{others[0]} is a convolution and {min(tokens)} works on tokens: skip the ones or the others"
        )
    return -1 if tokens else 1


def add_shortcuts(
    model: nn.Module, example: Tensor, edge_bits: int | None, skip: tuple[str, ...]
) -> tuple[list[str], dict[str, int]]:
    """Add a shortcut around each convolution between batch norms.

    Args:
        model: in evaluation mode; changed in place.
        example: an input of it.
        edge_bits: of the first and the last layer, which have none.
        skip: layers left in float.

    Returns:
        the layers whose weights and inputs are to be signs, and the bits of those that shortcuts lead through.

    Raises:
        Unsupported: there is no such convolution, or the module that calls it cannot be traced.
    """
    plan, signs = ShortcutPlan(model, example), one_bit_layers(model, example, edge_bits, skip)
    branches = plan.branches()
    main = [name for name in signs if name not in branches]
    if not plan.apply(main):
        raise Unsupported("no convolution is read by a batch norm alone, and keeps the shape: no shortcut can be added")
    return (signs, {}) if edge_bits is None else (main, dict.fromkeys(branches, edge_bits))
