"""What lies between the products of a decoder layer, by kernels of one pass each where PyTorch makes half a dozen.

There is no list of architectures: a class of modules is served when one of it, made small, gives the very numbers that the kernel
gives, and a function when it does for small tensors.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nnprune.native import kernels, library

Forward = Callable[[nn.Module, Tensor], Tensor]

Patch = tuple[Any, str, Callable]
"""A class or Python module, the name of one of its functions, and a faster one."""

ROTATION = "apply_rotary_pos_emb"
"""What transformers' models call, in the Python module of their attention, to rotate queries and keys."""

WIDTH = 64
"""Features of the small modules that are tried."""

_found: dict[type[nn.Module], list[Patch]] = {}
"""Class of a decoder layer -> what can be faster within it."""


@contextmanager
def fast_elementwise(layer: Any) -> Iterator[None]:
    """Within it, RMS norms, rotations and gated MLPs of a decoder layer compute in bfloat16 on a CPU what they always do, faster.

    Their linears are called as ever, so that hooks on these see what they always see. With gradients nothing changes.
    """
    if not isinstance(layer, nn.Module) or torch.is_grad_enabled() or library.library() is None:
        yield
        return
    if type(layer) not in _found:
        _found[type(layer)] = _find(layer)
    own = [(owner, name, getattr(owner, name)) for owner, name, _ in _found[type(layer)]]
    try:
        _put(_found[type(layer)])
        yield
    finally:
        _put(own)


def _put(functions: list[Patch]) -> None:
    for owner, name, function in functions:
        setattr(owner, name, function)


def _find(layer: nn.Module) -> list[Patch]:
    """What can be faster in a layer, once each."""
    found: dict[tuple[Any, str], Callable] = {}
    for module in layer.modules():
        kind, home = type(module), sys.modules[type(module).__module__]
        for owner, name, make, subject in (
            (kind, "forward", _fast_norm, module),
            (kind, "forward", _fast_mlp, module),
            (home, ROTATION, _fast_rotation, getattr(home, ROTATION, None)),
        ):
            if (owner, name) not in found and (function := make(subject)):
                found[owner, name] = function
    return [(owner, name, function) for (owner, name), function in found.items()]


def _fast_norm(module: nn.Module) -> Forward | None:
    """A forward for a class of norms, if it scales by the root mean square as Llama does (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    names = [name for name in ("variance_epsilon", "eps") if isinstance(getattr(module, name, None), float)]
    if not names or set(module._parameters) != {"weight"} or module._modules or module._buffers:
        return None
    own, eps = type(module).forward, names[0]

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        weight = self._parameters.get("weight")  # others of this class may have none
        if weight is not None and kernels.has_elementwise(hidden_states, weight):
            return kernels.rms_norm(hidden_states, weight, getattr(self, eps))
        return own(self, hidden_states)

    small = _with(module, _parameters={"weight": nn.Parameter(_random(1, WIDTH)[0], requires_grad=False)})
    return forward if _agree(own, forward, small) else None


def _fast_mlp(module: nn.Module) -> Forward | None:
    """A forward for a class of MLPs, if it is down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""
    if set(module._modules) != {"gate_proj", "up_proj", "down_proj", "act_fn"} or module._parameters:
        return None
    own = type(module).forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if is_silu(self.act_fn) and kernels.has_elementwise(gate, up):
            return self.down_proj(kernels.silu_product(gate, up))
        return self.down_proj(self.act_fn(gate) * up)

    def is_silu(act_fn: nn.Module) -> bool:
        return type(act_fn) is type(module.act_fn)

    linears = {name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("gate_proj", "up_proj", "down_proj")}
    for linear in linears.values():
        linear.weight = nn.Parameter(_random(WIDTH, WIDTH), requires_grad=False)
    return forward if _agree(own, forward, _with(module, _modules={**module._modules, **linears})) else None


def _fast_rotation(own: Callable | None) -> Callable | None:
    """The function itself for a Python module's rotary embedding, if it is that of GPT-NeoX, in one pass."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not args and not kwargs and all(kernels.has_rotation(X, cos, sin) for X in (q, k)):
            return kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)
        return own(q, k, cos, sin, *args, **kwargs)

    tokens, heads = 8, (2, 1)
    q, k = (_random(count * tokens, WIDTH).view(1, count, tokens, WIDTH) for count in heads)
    cos, sin = _random(2 * tokens, WIDTH).view(2, 1, tokens, WIDTH)
    try:
        wanted, found = own(q, k, cos, sin), rotate(q, k, cos, sin)
    except Exception:  # there is none, or it takes something else
        return None
    return rotate if all(map(torch.equal, wanted, found)) else None


def _with(module: nn.Module, **changed: Any) -> nn.Module:
    """A copy that shares all but what is changed."""
    twin = copy.copy(module)
    twin.__dict__ = {**module.__dict__, **changed}
    return twin


def _agree(own: Forward, ours: Forward, module: nn.Module) -> bool:
    """Whether both give the same for a small module, but for some last digits: sums may be taken in another order."""
    X = 3 * _random(256, WIDTH)
    try:
        wanted, found = own(module, X), ours(module, X)
    except (TypeError, RuntimeError):  # it takes something else
        return False
    same = found.shape == wanted.shape and found.dtype == wanted.dtype and torch.allclose(found, wanted, rtol=2**-7, atol=1e-6)
    return same and float((found != wanted).float().mean()) < 0.01


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float32).bfloat16()
