"""What targets, updates and the solvers behind them promise, each method by a property of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnprune.patterns import NM, Unstructured, parse_pattern
from nnprune.pruners.admm import ADMM
from nnprune.pruners.alps import ALPS
from nnprune.pruners.base import Pruner
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.pruners.wanda import Wanda
from nnprune.solvers import conjugate_gradients
from nnprune.solvers.least_squares import ScaledProblem
from nnprune.solvers.mask_projection import Projection
from nnprune.statistics import CrossProduct, Hessian
from nnprune.targets import Asymmetric
from nnprune.updates import Refit


def problem(rows: int, width: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Hessian]:
    """A weight (rows, width), correlated inputs (tokens, width) of very different loudness, and their Hessian."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    X = torch.randn(tokens, width, generator=generator) @ mixing * torch.rand(width, generator=generator).mul(5).exp()
    X[:, 1] = 0
    statistic = Hessian()
    statistic.add(X)
    return W, X, statistic


def prune(pruner: Pruner, W: torch.Tensor, X: torch.Tensor, spec: str) -> torch.Tensor:
    pruner.add_linear_activations("l", X)
    return pruner.prune_linear(W, "l", parse_pattern(spec))


def error(W: torch.Tensor, pruned: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """(rows,): squared error of each output feature, in float64."""
    return ((pruned.double() - W.double()) @ X.double().t()).square().sum(1)


def best_on_support(W: torch.Tensor, pruned: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Exact least squares on the nonzeros of `pruned`, row by row, in float64."""
    answer = torch.zeros_like(W, dtype=torch.float64)
    for row in range(len(W)):
        kept = pruned[row] != 0
        wanted = X.double() @ W[row].double()
        answer[row, kept] = torch.linalg.lstsq(X[:, kept].double(), wanted[:, None], driver="gelsd").solution[:, 0]
    return answer


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
    monkeypatch.setitem(conjugate_gradients.STEPS_PER_READ, "cpu", every)
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


@pytest.mark.parametrize("spec", ["0.5", "0.7", "2:4", "4:8"])
def test_the_support_of_alps_beats_that_of_sparsegpt(spec):
    W, X, _ = problem(48, 64, 1000)
    errors = [error(W, best_on_support(W, prune(pruner, W, X, spec), X), X).sum() for pruner in (SparseGPT(), ALPS())]
    assert errors[1] < 0.95 * errors[0]


def test_a_longer_search_finds_better_supports():
    W, X, _ = problem(48, 64, 1000)
    short, long = (
        error(W, prune(pruner, W, X, "2:4"), X).sum() for pruner in (ALPS(), ALPS(num_iterations=60, num_refit_steps=10))
    )
    assert long < short


def test_with_one_rho_alps_takes_the_paper_s_steps():
    W, X, statistic = problem(8, 32, 500)
    damped = ScaledProblem(statistic, 0.01, "l")
    A, B0 = damped.A.double(), damped.scaled(W).t().double()
    B, U, rho = B0, torch.zeros_like(B0), 0.5
    for _ in range(7):
        mask = NM(2, 4).mask((B + U).t().abs()).t()
        D = (B + U) * mask
        U = U + B - D
        B = torch.linalg.solve(A + rho * torch.eye(32), A @ B0 + rho * (D - U))
    pruned = prune(ALPS(first_rho=rho, last_rho=rho, num_iterations=7), W, X, "2:4")
    assert torch.equal((pruned != 0).t(), NM(2, 4).mask((B + U).t().abs()).t())


def test_gradual_masks_beat_wandas():
    W, X, _ = problem(48, 64, 1000)
    for spec in ("0.6", "2:4", "4:8"):
        gradual, fixed = (prune(ADMM(num_mask_iterations=count), W, X, spec) for count in (15, 0))
        assert error(W, gradual, X).sum() < error(W, fixed, X).sum()


def test_admm_uses_all_of_its_freedom():
    """4:8 must not be 2:4 in disguise."""
    W, X, _ = problem(16, 64, 1000)
    pruned = prune(ADMM(), W, X, "4:8")
    assert (pruned.unflatten(1, (-1, 4)) != 0).sum(-1).max() > 2


@given(n=st.integers(1, 17), m=st.integers(2, 20), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_a_fast_projection_onto_groups_is_exact(n, m, seed):
    if n < m:
        score = torch.rand(4 * m, 7, generator=torch.Generator().manual_seed(seed))
        projection = Projection(NM(n, m), [3, 4])
        assert torch.equal(projection.exact(score), projection.fast(score.clone()).bool())


def test_a_fast_projection_without_structure_is_near():
    score = torch.rand(96, 600, generator=torch.Generator().manual_seed(0))
    projection = Projection(Unstructured(0.7), [400, 200])
    for piece in projection.fast(score.clone()).split([400, 200], dim=1):
        assert float(piece.mean()) == pytest.approx(0.3, abs=0.01)
    assert int((~projection.exact(score)).sum()) == 280 * 96 + 140 * 96


def test_a_projection_on_its_way_keeps_the_best_of_each_group_and_more():
    score = torch.rand(64, 50, generator=torch.Generator().manual_seed(0))
    projection = Projection(NM(2, 4), [50])
    mask = projection.fast(score.clone(), 0.3)
    assert (mask >= projection.fast(score)).all()
    assert float(mask.mean()) == pytest.approx(0.7, abs=0.02)


def pair(W: torch.Tensor, X: torch.Tensor, X_dense: torch.Tensor, **options: float) -> torch.Tensor:
    hessian, cross = Hessian(), CrossProduct()
    hessian.add(X)
    cross.add(X, X_dense)
    return Asymmetric(**options).weights({"l": W}, {Hessian: hessian, CrossProduct: cross})["l"]


def test_the_asymmetric_target_is_the_regression_on_the_dense_outputs():
    W, X_dense, _ = problem(8, 24, 800)
    X = X_dense + 0.3 * torch.randn(X_dense.shape, generator=torch.Generator().manual_seed(1))
    wanted = X_dense.double() @ W.double().t()
    exact = torch.linalg.lstsq(X.double(), wanted).solution.t()
    whole = pair(W, X, X_dense, alpha=1.0, damping=1e-7)
    assert torch.allclose(whole.double(), exact, atol=1e-2 * float(exact.abs().max()))
    assert torch.allclose(pair(W, X, X_dense, alpha=0.25, damping=1e-7), 0.75 * W + 0.25 * whole, atol=1e-4)


def test_without_upstream_errors_the_target_is_the_dense_weight():
    W, X, _ = problem(8, 24, 800)
    assert torch.allclose(pair(W, X, X, alpha=1.0), W, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Asymmetric(alpha=0), "target.alpha=0: must be above 0"),
        (lambda: Asymmetric(damping=0), "target.damping=0: must be a number greater"),
        (lambda: Refit(max_steps=0), "update.max_steps=0: must be a whole number"),
        (lambda: Refit(max_steps=10**9), "update.max_steps=1000000000: .* at most 100000"),
        (lambda: Refit(tolerance=0), "update.tolerance=0: must be a number greater than 0 and less than 1"),
        (lambda: Refit(tolerance=1.0), "update.tolerance=1.0: must be a number greater than 0 and less than 1"),
        (lambda: Refit(damping=-1), "update.damping=-1: must be a number greater"),
        (lambda: ADMM(num_iterations=3), "pruner.num_mask_iterations=15: must not exceed pruner.num_iterations=3"),
        (lambda: ALPS(first_rho=2.0), "pruner.last_rho=0.7: must lie between pruner.first_rho=2.0 and four times that"),
        (lambda: ALPS(first_rho=0.1), "pruner.last_rho=0.7: must lie between pruner.first_rho=0.1 and four times that"),
        (lambda: ALPS(num_iterations=0), "pruner.num_iterations=0: must be a whole number"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
