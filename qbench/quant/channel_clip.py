"""ReLU6 with a limit of its own for each channel, so that channels may be scaled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qbench.quant import structure


class ChannelClip(nn.Module):
    """Clip each channel to [0, its limit]."""

    limit: Tensor

    def __init__(self, channels: int, axis: int, limit: float) -> None:
        """Limits that are equal at first.

        Args:
            channels: how many there are.
            axis: of the input that counts them, from the end (negative).
            limit: of all of them.
        """
        super().__init__()
        shape = [1] * -axis
        shape[axis] = channels
        self.register_buffer("limit", torch.full(shape, limit))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0).minimum(self.limit)


@structure.operation("channel_clip")
def _channel_clip(model: nn.Module, *, module: str, channels: int, axis: int, limit: float) -> None:
    gone = model.get_submodule(module)
    clip = ChannelClip(channels, axis, limit).train(gone.training)
    parameter = next(model.parameters(), None)
    structure.replace_module(model, module, clip if parameter is None else clip.to(parameter))
