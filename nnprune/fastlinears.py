"""Forwards of linears on a CPU's matrix units, nearer to their rate than PyTorch's own product, with the same results."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nnprune.native import kernels, library


@contextmanager
def fast_linears() -> Iterator[None]:
    """Within it, linears in bfloat16 compute on a CPU what they always do, faster. With gradients nothing changes."""
    if torch.is_grad_enabled() or library.library() is None:
        yield
        return
    own = nn.Linear.forward

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        if kernels.has_linear(input, self.weight, self.bias):
            return kernels.linear(input, self.weight, self.bias)
        return own(self, input)

    nn.Linear.forward = forward
    try:
        yield
    finally:
        nn.Linear.forward = own
