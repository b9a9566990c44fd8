"""What ADMM, ALPS, their projections and the asymmetric target promise, each by a property of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import best_on_support, error, problem, prune

from nnprune.patterns import NM, Unstructured
from nnprune.pruners.admm import ADMM
from nnprune.pruners.alps import ALPS
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.solvers.least_squares import ScaledProblem
from nnprune.solvers.mask_projection import Projection
from nnprune.statistics import CrossProduct, Hessian
from nnprune.targets import Asymmetric
from nnprune.updates import Refit


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
    A, B0 = damped.A.double(), damped.scale_(W.t().clone()).double()
    B, U, rho = B0, torch.zeros_like(B0), 0.5
    for _ in range(7):
        mask = NM(2, 4).mask((B + U).t().abs()).t()
        D = (B + U) * mask
        U = U + B - D
        B = torch.linalg.solve(A + rho * torch.eye(32), A @ B0 + rho * (D - U))
    pruned = prune(ALPS(first_rho=rho, last_rho=rho, num_iterations=7), W, X, "2:4")
    assert torch.equal((pruned != 0).t(), NM(2, 4).mask((B + U).t().abs()).t())


def test_shrinkage_is_a_calibration_on_one_more_token_for_each_input():
    _, X, statistic = problem(16, 32, 500)
    longer = Hessian()
    longer.add(torch.cat([X, (0.3 * len(X) * statistic.mean().diagonal().mean()).sqrt() * torch.eye(32)]))
    shrunk, expected = ScaledProblem(statistic, 0.01, "l", shrinkage=0.3), ScaledProblem(longer, 0.01, "l")
    torch.testing.assert_close(shrunk.A, expected.A)


def test_shrinkage_protects_the_weights_of_an_input_that_is_hardly_active():
    W, X, _ = problem(48, 64, 1000)
    X[:, 0] *= 0.01
    without, shrunk = ((prune(pruner, W, X, "0.5")[:, 0] != 0).sum() for pruner in (ALPS(), ALPS(shrinkage=1.0)))
    assert without < 5 < 10 < shrunk


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
        (lambda: Refit(bias="yes"), "update.bias=yes: must be auto, true or false"),
        (lambda: Refit(max_steps=0), "update.max_steps=0: must be a whole number"),
        (lambda: Refit(max_steps=10**9), "update.max_steps=1000000000: .* at most 100000"),
        (lambda: Refit(tolerance=0), "update.tolerance=0: must be a number greater than 0 and less than 1"),
        (lambda: Refit(tolerance=1.0), "update.tolerance=1.0: must be a number greater than 0 and less than 1"),
        (lambda: Refit(damping=-1), "update.damping=-1: must be a number greater"),
        (lambda: ADMM(num_iterations=3), "pruner.num_mask_iterations=15: must not exceed pruner.num_iterations=3"),
        (lambda: ALPS(first_rho=2.0), "pruner.last_rho=0.7: must lie between pruner.first_rho=2.0 and four times that"),
        (lambda: ALPS(first_rho=0.1), "pruner.last_rho=0.7: must lie between pruner.first_rho=0.1 and four times that"),
        (lambda: ALPS(num_iterations=0), "pruner.num_iterations=0: must be a whole number"),
        (lambda: ALPS(shrinkage=-0.1), "pruner.shrinkage=-0.1: must be a number, at least 0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
