"""Conjugate gradients for the weights on a fixed mask, all output features at once.

For each output feature, a column b of B (I, O) with target b0 and support S, minimises (b - b0)^T A (b - b0) over the nonzeros of b:
phase 2 of ALPS (Meng et al. 2024, arXiv:2406.07831, section 3.3). A has a constant diagonal (least_squares.py), so the method needs
no other preconditioner.

Products may round their factors, which perturbs A by an E that can be larger than the smallest eigenvalues of A. Where inputs are
strongly correlated that leads astray. With D the change of an output's weights, its error falls by what the recursion says, D^T (A + E) D,
but for D^T E D. So an output whose error has not fallen by clearly more than ||E|| ||D||^2 is computed again, without rounding.

An output stops when its residual S A (b0 - b) has fallen to `tolerance` of its first one, but not before `MIN_STEPS`. From then on
its column does not change, so that the result depends neither on the other outputs nor on how often the loop reads the residuals.
Outputs converge at very different rates: finished ones leave the products as soon as there are enough of them.

Letters: O output features (of several linears side by side), I input features. Float32 throughout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nnprune.checks import is_set
from nnprune.kernels.matmul import FastFactor
from nnprune.kernels.work_sizes import work_sizes

SHRINK_BELOW = 0.75
"""Share of unfinished outputs below which the finished ones are taken out: that copies four matrices."""

CLEARLY = 3
"""How many times ||E|| ||D||^2 an output's error must have fallen by. At 1 some that were led astray pass; at 3 ordinary ones still do."""

PROBES = 16
"""Vectors that ||E|| is estimated with."""

MIN_STEPS = 7
"""Steps of an output whatever its residual: after a start far from the solution, as on Wanda's mask, the residual falls to a tenth
while the layer error is still 10 % above its minimum."""


@dataclass
class Solution:
    """What `conjugate_gradients` found.

    Args:
        B: (I, O), the weights.
        residuals: (O,), the last residual norm of each output over its first one; 0 where the first was 0.
        steps: (O,), int64, steps that each output took.
    """

    B: Tensor
    residuals: Tensor
    steps: Tensor


@torch.no_grad()
def conjugate_gradients(A: Tensor, B: Tensor, B0: Tensor, max_steps: int, tolerance: float = 0.0) -> Solution:
    """Move the nonzeros of B (I, O) towards the best values for their support; no output ends with a larger error.

    The solver works on the correction of B, so that its products but the first may round their factors (`FastFactor`). Outputs for which
    that matters are computed again without; on a device for which the host does not wait, that is put off (`checks.deferring`).

    Args:
        A: (I, I), symmetric positive definite, of constant diagonal.
        B: (I, O), contiguous, where to start; overwritten, but its zeros stay.
        B0: (I, O), the target.
        max_steps: of each output.
        tolerance: relative residual norm at which an output stops after MIN_STEPS; 0: all take `max_steps`.
    """
    start, factor = B.clone(), FastFactor(A)
    found, gains = _solve(factor, A, B, B0, max_steps, tolerance)
    is_astray = gains < CLEARLY * _rounding(A, factor) * (B - start).square_().sum(0)
    is_any = is_astray.any()
    if is_set(is_any) if work_sizes(B.device).is_asynchronous else bool(is_any):
        columns = is_astray.nonzero().flatten()
        again, _ = _solve(FastFactor(A, rounds=False), A, start[:, columns], B0[:, columns], max_steps, tolerance)
        for old, new in zip(vars(found).values(), vars(again).values(), strict=True):
            old[..., columns] = new
    return found


def _solve(factor: FastFactor, A: Tensor, B: Tensor, B0: Tensor, max_steps: int, tolerance: float) -> tuple[Solution, Tensor]:
    """As `conjugate_gradients`, with products by `factor`; and by how much the error of each output fell (O,), by the recursion."""
    work = _Outputs.start(A, B, B0, tolerance)
    first, residuals, steps = work.norm.clone(), work.norm.clone(), torch.zeros_like(work.columns)
    gains = torch.zeros_like(first)
    every = work_sizes(B.device).steps_per_read  # before MIN_STEPS few have finished
    for step in range(1, max_steps + 1):
        work.advance(factor)
        if step % every == 0 and tolerance and (every == 1 or step >= MIN_STEPS):
            running = work.running()
            num_running = int(running.count_nonzero())
            if num_running < SHRINK_BELOW * len(work.columns):
                work.store(B, residuals, steps, gains)
                work.select(running, num_running)
            if not num_running:
                break
    work.store(B, residuals, steps, gains)
    return Solution(B, (residuals / first).nan_to_num_(0, 0, 0).sqrt_(), steps), gains


def _rounding(A: Tensor, factor: FastFactor) -> Tensor:
    """About the spectral norm () of what the products with `factor` round away, by power iteration."""
    generator = torch.Generator(A.device).manual_seed(0)
    vectors = torch.randn(len(A), PROBES, generator=generator, device=A.device)
    for _ in range(3):
        vectors /= vectors.norm(dim=0).clamp_min_(1e-30)
        vectors = A @ vectors - factor.times(vectors)
    return vectors.norm(dim=0).max()


@dataclass
class _Outputs:
    """The outputs (n of O) that are still computed with."""

    columns: Tensor
    """(n,), their places among all outputs."""
    B: Tensor
    """(I, n)."""
    support: Tensor
    """(I, n), ones and zeros."""
    residual: Tensor
    """(I, n), S A (B0 - B)."""
    direction: Tensor
    """(I, n)."""
    norm: Tensor
    """(n,), squared norm of the residual."""
    limit: Tensor
    """(n,), squared norm at which an output is finished."""
    steps: Tensor
    """(n,), taken so far."""
    gain: Tensor
    """(n,), by how much the error fell so far."""

    @classmethod
    def start(cls, A: Tensor, B: Tensor, B0: Tensor, tolerance: float) -> "_Outputs":
        """All outputs before the first step."""
        support = (B != 0).to(B.dtype)
        residual = (A @ (B0 - B)).mul_(support)
        norm = residual.square().sum(0)
        columns = torch.arange(B.shape[1], device=B.device)
        none = torch.zeros_like(columns), torch.zeros_like(norm)
        return cls(columns, B, support, residual, residual.clone(), norm, norm * tolerance**2, *none)

    def running(self) -> Tensor:
        """(n,), bool: not finished yet."""
        return (self.norm > self.limit) | ((self.steps < MIN_STEPS) & (self.norm > 0))

    def advance(self, factor: FastFactor) -> None:
        """One step of every output that is not finished."""
        running = self.running()
        product = factor.times(self.direction)
        length = self.norm / (self.direction * product).sum(0)
        length.nan_to_num_(0, 0, 0).clamp_(min=0).mul_(running)  # nothing left to do, or nothing but rounding
        self.gain.addcmul_(length, self.norm)
        self.B.addcmul_(self.direction, length)
        self.residual.addcmul_(product.mul_(self.support), length, value=-1)
        norm = torch.mul(self.residual, self.residual, out=product).sum(0)
        self.direction.mul_((norm / self.norm).nan_to_num_(0, 0, 0)).add_(self.residual)
        self.norm = norm
        self.steps += running

    def store(self, B: Tensor, residuals: Tensor, steps: Tensor, gains: Tensor) -> None:
        """Write these outputs to B (I, O), their squared residuals (O,), their steps (O,) and their gains (O,)."""
        if self.B is not B:
            B[:, self.columns] = self.B
        residuals[self.columns] = self.norm
        steps[self.columns] = self.steps
        gains[self.columns] = self.gain

    def select(self, chosen: Tensor, num_chosen: int) -> None:
        """Leave out the outputs where `chosen` (n,) is False."""
        place = chosen.nonzero_static(size=num_chosen).flatten()  # the host need not wait for the number
        for name, tensor in vars(self).items():  # one after the other: each frees what it replaces
            setattr(self, name, tensor.index_select(-1, place))
