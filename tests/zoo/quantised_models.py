"""Models for quantisers that calibrate."""

import torch
from torch import nn


class Gelu(nn.Module):
    """Two Linears with a GELU between."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48, bias=bias), nn.Linear(48, 32, bias=bias)

    def forward(self, x):
        """Map ``(…, 32)`` to the same shape."""
        return self.down(nn.functional.gelu(self.up(x)))


class Convs(nn.Module):
    """A CNN with a Linear as its head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.next = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, stride=2)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        """Map pixels to labels."""
        return self.down(torch.tanh(self.next(torch.tanh(self.up(x)))).mean((2, 3)))
