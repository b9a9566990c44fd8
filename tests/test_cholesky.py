"""Factorisations of a hessian, whatever its width."""

import pytest
import torch

from nnprune.checks import deferring
from nnprune.solvers.cholesky import LEAF, cholesky_, factor_of_inverse


@pytest.mark.parametrize("width", [1, 7, LEAF, LEAF + 1, 2 * LEAF, 6 * LEAF, 4 * LEAF + 4])
def test_it_is_the_factor_of_the_inverse(width, device):
    generator = torch.Generator().manual_seed(width)
    X = torch.randn(3 * width + 2, width, generator=generator, dtype=torch.float64)
    hessian = X.t() @ X / len(X) + 0.1 * torch.eye(width)
    U, failed = factor_of_inverse(hessian.float().to(device))
    assert not failed
    assert torch.equal(U, U.triu())
    expected = torch.linalg.cholesky(hessian.inverse(), upper=True)
    torch.testing.assert_close(U.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_a_failure_is_told_at_once_or_put_off(device):
    indefinite = torch.diag(torch.tensor([1.0, -1.0, 1.0], device=device))
    assert cholesky_(indefinite.clone())[1] and factor_of_inverse(indefinite.clone())[1]
    with deferring() as flags:
        assert not cholesky_(indefinite.clone())[1]
        assert not factor_of_inverse(torch.eye(3, device=device))[1]
    assert [bool(flag) for flag in flags] == [True, False]
    assert cholesky_(indefinite.clone())[1], "outside again"
