"""What a refit promises: never a larger layer error, the least squares solution in the end, and its tolerance in between."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import set_work_sizes
from support.problems import best_on_support, error, problem, prune

from nnprune.checks import deferring
from nnprune.patterns import parse_pattern
from nnprune.pruners.admm import ADMM
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.pruners.wanda import Wanda
from nnprune.solvers import conjugate_gradients
from nnprune.solvers.least_squares import ScaledProblem
from nnprune.statistics import Hessian
from nnprune.updates import Refit


@given(
    rows=st.integers(1, 8),
    width=st.integers(2, 60),
    tokens=st.integers(1, 200),
    steps=st.integers(1, 30),
    kept=st.floats(0.1, 0.9),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_a_refit_never_raises_the_layer_error(rows, width, tokens, steps, kept, seed):
    W, _, statistic = problem(rows, width, tokens, seed)
    mask = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < kept
    refitted = Refit(max_steps=steps).update_group({"l": W * mask}, {"l": W}, statistic)["l"]
    assert torch.equal((refitted != 0) & ~mask, torch.zeros_like(mask))
    damped = ScaledProblem(statistic, 0.01, "l")
    A = damped.A.double()

    def loss(weight: torch.Tensor) -> torch.Tensor:
        difference = (weight.double() - W.double()) * damped.scale.double()
        return (difference @ A * difference).sum(1)

    assert (loss(refitted) <= loss(W * mask) * (1 + 1e-4) + 1e-9).all()


def test_many_steps_reach_the_least_squares_solution():
    W, X, statistic = problem(6, 32, 500)
    mask = torch.rand(6, 32, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, 1] = False  # a dead input has no best weight
    refitted = Refit(1e-6, 200, damping=1e-6).update_group({"l": W * mask}, {"l": W}, statistic)["l"]
    exact = error(W, best_on_support(W, W * mask, X), X).sum()
    assert error(W, refitted, X).sum() < 1.02 * exact < 0.8 * error(W, W * mask, X).sum()


def masked(W: torch.Tensor, seed: int = 1) -> torch.Tensor:
    return W * (torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)


def true_residuals(damped: ScaledProblem, W: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
    """(rows,), in float64: the norm of S A (B0 - B) of each weight on the support S of the first."""
    support = (weights[0] != 0).double()
    differences = [(W.double() - weight.double()) * damped.scale.double() for weight in weights]
    return [((difference @ damped.A.double()) * support).norm(dim=1) for difference in differences]


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.03])
def test_a_refit_stops_at_its_tolerance_and_says_so(tolerance):
    W, _, statistic = problem(32, 64, 1000)
    refit, pruned = Refit(tolerance, max_steps=200), masked(W)
    refitted = refit.update_group({"l": pruned}, {"l": W}, statistic)["l"]
    first, last = true_residuals(ScaledProblem(statistic, 0.01, "l"), W, pruned, refitted)
    assert (last <= 1.1 * tolerance * first + 1e-5 * first.max()).all()
    note = refit.notes["l"]
    assert 0 < note["refit_residual"] <= tolerance
    assert note["refit_steps"] >= conjugate_gradients.MIN_STEPS
    assert note["refit_residual"] == pytest.approx(float((last / first).max()), rel=0.1)
    assert 1 < note["refit_steps"] < 200


def test_a_refit_that_max_steps_ends_says_how_far_it_is():
    W, _, statistic = problem(32, 64, 1000)
    refit, pruned = Refit(0.01, max_steps=3), masked(W)
    refitted = refit.update_group({"l": pruned}, {"l": W}, statistic)["l"]
    first, last = true_residuals(ScaledProblem(statistic, 0.01, "l"), W, pruned, refitted)
    assert refit.notes["l"] == {"refit_steps": 3, "refit_residual": pytest.approx(float((last / first).max()), rel=0.02)}
    assert refit.notes["l"]["refit_residual"] > 0.01


@pytest.mark.parametrize("every", [1, 4])
def test_what_an_output_becomes_depends_on_no_other(every, monkeypatch):
    set_work_sizes(monkeypatch, steps_per_read=every)
    W, _, statistic = problem(48, 64, 1000)
    pruned = masked(W)
    pruned[3] = W[3]  # nothing to do
    together = Refit().update_group({"l": pruned}, {"l": W}, statistic)["l"]
    rows = [{"l": pruned[row : row + 1]} for row in range(len(W))]
    alone = torch.cat([Refit().update_group(row, {"l": W[i : i + 1]}, statistic)["l"] for i, row in enumerate(rows)])
    first, one, other = true_residuals(ScaledProblem(statistic, 0.01, "l"), W, pruned, together, alone)
    for residual in (one, other):
        assert (residual <= 0.11 * first + 1e-5 * first.max()).all()
    damped = ScaledProblem(statistic, 0.01, "l")
    A = damped.A.double()
    differences = [(weight - W) * damped.scale.double() for weight in (together, alone)]
    losses = [(difference @ A * difference).sum(1) for difference in differences]
    assert torch.allclose(*losses, rtol=0.05)  # one step more or less where a residual meets the tolerance
    assert torch.allclose(together[3], W[3])


def test_a_refit_hardly_amplifies_the_rounding_of_the_hessian():
    """Seven steps end 3 % apart for two hessians that differ by 3e-6, 7 % from the solution."""
    W, X, statistic = problem(64, 256, 400)
    other = Hessian()
    other.add(X)
    noise = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
    other._sum *= 1 + 3e-6 * (noise + noise.t())
    pruned = masked(W)
    one, two = (Refit().update_group({"l": pruned}, {"l": W}, each)["l"].double() for each in (statistic, other))
    exact = Refit(1e-5, 2000).update_group({"l": pruned}, {"l": W}, statistic)["l"].double()
    A, scale = ScaledProblem(statistic, 0.01, "l").A.double(), ScaledProblem(statistic, 0.01, "l").scale.double()

    def size(weight: torch.Tensor) -> float:
        return float(((weight * scale) @ A * (weight * scale)).sum().sqrt())

    gain = size(pruned.double() - exact)
    assert size(one - exact) < 0.15 * gain
    assert size(one - two) < 0.02 * gain


@pytest.mark.parametrize("pruner", [Wanda, SparseGPT, ADMM])
@pytest.mark.parametrize("spec", ["0.5", "2:4"])
def test_a_refit_helps_any_mask(pruner, spec):
    W, X, statistic = problem(32, 64, 1000)
    pruned = prune(pruner(), W, X, spec)
    refitted = Refit().update_group({"l": pruned}, {"l": W}, statistic)["l"]
    parse_pattern(spec).check(refitted)
    assert error(W, refitted, X).sum() < error(W, pruned, X).sum()


class RoundingFactor:
    """A `FastFactor` that rounds to bfloat16 on any processor."""

    def __init__(self, matrix: torch.Tensor, rounds: bool = True) -> None:
        self.matrix, self.rounds = matrix.bfloat16().float() if rounds else matrix, rounds

    def times(self, right: torch.Tensor) -> torch.Tensor:
        return self.matrix @ (right.bfloat16().float() if self.rounds else right)


@pytest.mark.parametrize("is_asynchronous", [False, True])
@pytest.mark.parametrize("inputs", ["mean", "few directions", "ordinary"])
def test_outputs_that_rounding_would_lead_astray_are_computed_again_without(inputs, is_asynchronous, monkeypatch):
    set_work_sizes(monkeypatch, is_asynchronous=is_asynchronous)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2048, 1024, generator=generator)
    if inputs == "mean":
        X = torch.randn(1024, generator=generator).sign() + 0.1 * X
    elif inputs == "few directions":
        X = X[:, :24] @ torch.randn(24, 1024, generator=generator) + 0.05 * X
    W, statistic = torch.randn(16, 1024, generator=generator), Hessian()
    statistic.add(X)
    scaled, pruned = ScaledProblem(statistic, 0.01, "l"), prune(SparseGPT(), W, X, "0.5")
    A, B0, start = scaled.A, *(scaled.scale_(weight.t().contiguous()) for weight in (W, pruned))

    def solve(factor) -> torch.Tensor:
        monkeypatch.setattr(conjugate_gradients, "FastFactor", factor)
        with deferring() as flags:  # as where the host does not wait, which does it again if one is set
            found = conjugate_gradients.conjugate_gradients(A, start.clone(), B0, 30, 0.1).B
        assert bool(flags) == is_asynchronous
        return conjugate_gradients.conjugate_gradients(A, start.clone(), B0, 30, 0.1).B if any(flags) else found

    exact, made = solve(lambda matrix, rounds=True: RoundingFactor(matrix, False)), []
    rounded = solve(lambda matrix, rounds=True: made.append(rounds) or RoundingFactor(matrix, rounds))
    before, least, errors = ((D * (A @ D)).sum(0) for D in (start - B0, exact - B0, rounded - B0))
    assert (errors <= before).all()
    assert errors.sum() < 1.1 * least.sum()
    assert (False in made) == (inputs != "ordinary")
