"""What all activation quantizers with codes of a fixed width have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Quantizer(nn.Module):
    """Codes of `bits` bits; whoever makes it again from its `config` and buffers has an equal one."""

    kind: ClassVar[str]

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @property
    def levels(self) -> int:
        """The most distinct values that share a scale."""
        return int(2**self.bits)

    def config(self) -> dict[str, Any]:
        """The arguments that it was made with, but for what buffers hold."""
        return {"bits": self.bits}
