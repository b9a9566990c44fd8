"""Statistics against a float64 reference, in any dtype and in any pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnprune.kernels.work_sizes import work_sizes
from nnprune.statistics import Hessian, Means, Moments, SquaredNorm

pytestmark = pytest.mark.usefixtures("native")

REFERENCE = {
    SquaredNorm: lambda X: X.square().mean(0),
    Moments: lambda X: torch.stack([X.mean(0), X.square().mean(0)]),
    Means: lambda X: X.mean(0).expand(2, -1),
    Hessian: lambda X: X.t() @ X / len(X),
}
each = pytest.mark.parametrize("kind", list(REFERENCE))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


ROUNDING = {"cpu": 1e-6, "cuda": 4e-6}
"""Relative error of a sum of some hundred products: matrix units of a CUDA device cut off digits where a CPU rounds."""


def inputs(dtype: torch.dtype, device: str = "cpu", num_tokens: int = 200, width: int = 48) -> torch.Tensor:
    """Inputs (tokens, width) with features of very different sizes and a common part, as those of a language model."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(num_tokens, width, generator=generator) + torch.randn(num_tokens, 1, generator=generator)
    return (X * torch.logspace(-2, 1, width)).to(device, dtype)


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_equals_the_float64_reference(kind, dtype, device):
    X = inputs(dtype, device)
    statistic = kind()
    statistic.add(X)
    mean, expected = statistic.mean(), REFERENCE[kind](X.double())
    assert mean.dtype == torch.float32
    assert mean.shape == expected.shape
    # A sum of terms of both signs, in the Hessian and the mean, has an error relative to the features' own size.
    size = X.double().square().mean(0).sqrt()
    scale = {SquaredNorm: size**2, Moments: torch.stack([size, size**2]), Means: size, Hessian: torch.outer(size, size)}[kind]
    assert ((mean - expected).abs() / scale).max() < ROUNDING[device]


def test_a_hessian_of_several_strips_is_whole(device):
    strip = work_sizes(torch.device(device)).strip
    X = inputs(torch.bfloat16, device, num_tokens=400, width=2 * strip + 37)
    statistic = Hessian()
    statistic.add(X)
    expected = REFERENCE[Hessian](X.double())
    assert (statistic.mean() - expected).norm() / expected.norm() < ROUNDING[device]
    assert torch.equal(statistic.mean().triu(strip), statistic.mean().tril(-strip).t())


@settings(max_examples=30)
@given(
    kind=st.sampled_from(list(REFERENCE)),
    dtype=st.sampled_from(DTYPES[:3]),
    cuts=st.lists(st.integers(1, 199), max_size=5, unique=True),
)
def test_streaming_in_pieces_equals_all_at_once(device, kind, dtype, cuts):
    X = inputs(dtype, device)
    streamed, whole = kind(), kind()
    for piece in torch.tensor_split(X, sorted(cuts)):
        streamed.add(piece)
    whole.add(X)
    assert streamed.num_tokens == whole.num_tokens == len(X)
    torch.testing.assert_close(streamed.mean(), whole.mean(), rtol=1e-5, atol=1e-5)


@each
def test_batches_and_tokens_are_the_same_to_a_statistic(kind, device):
    X = inputs(torch.float32, device)
    batched, flat = kind(), kind()
    batched.add(X.view(4, 50, -1))
    flat.add(X)
    assert batched.num_tokens == 200
    assert torch.equal(batched.mean(), flat.mean())


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_left_alone(kind, dtype, device):
    X = inputs(dtype, device)
    before = X.clone()
    kind().add(X)
    assert torch.equal(X, before)


@each
def test_mean_is_fresh_each_time(kind, device):
    statistic = kind()
    X = inputs(torch.float32, device)
    statistic.add(X)
    statistic.mean().zero_()
    assert statistic.mean().abs().sum() > 0
    statistic.add(X * 3)
    expected = REFERENCE[kind](torch.cat([X, X * 3]).double()).float()
    torch.testing.assert_close(statistic.mean(), expected, rtol=1e-5, atol=1e-5)


@each
def test_one_add_does_not_alias_its_input(kind):
    X = torch.ones(1, 4)
    statistic = kind()
    statistic.add(X)
    X.zero_()
    assert (statistic.mean() == 1).all()


@each
def test_no_tokens_have_no_mean(kind):
    statistic = kind()
    with pytest.raises(ValueError, match="no calibration tokens"):
        statistic.mean()
    assert not statistic.finite()


@each
@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (float("nan"), False), (float("inf"), False), (1e30, False)])
def test_is_finite(kind, value, finite, device):
    statistic = kind()
    statistic.add(torch.ones(3, 4, device=device))
    X = torch.ones(3, 4, device=device)
    X[1, 2] = value
    statistic.add(X)
    statistic.add(torch.ones(3, 4, device=device))
    assert bool(statistic.finite()) is (finite or (kind is Means and value == 1e30))  # it sums no squares


@each
def test_float16_sums_do_not_overflow(kind, device):
    statistic = kind()
    X = torch.full((4, 3), 6e4, dtype=torch.float16, device=device)
    statistic.add(X)
    assert statistic.finite()
    torch.testing.assert_close(statistic.mean(), REFERENCE[kind](X.double()).float(), rtol=1e-6, atol=0)


def test_memo_computes_once_per_key_and_forgets_on_add():
    statistic = SquaredNorm()
    statistic.add(torch.ones(2, 3))
    calls = []

    def compute() -> int:
        calls.append(1)
        return len(calls)

    assert [statistic.memo("a", compute), statistic.memo("a", compute), statistic.memo("b", compute)] == [1, 1, 2]
    statistic.add(torch.ones(2, 3))
    assert statistic.memo("a", compute) == 3


@pytest.mark.parametrize("before", ["highest", "high"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_matmul_precision_is_put_back(before, dtype):
    original = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        Hessian().add(inputs(dtype))
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(original)


@pytest.mark.parametrize("native", ["pytorch"], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "medium"), (torch.float16, "highest"), (torch.float32, "highest")]
)
def test_only_bfloat16_is_multiplied_as_such_and_an_exception_ends_it(monkeypatch, native, dtype, precision):
    before = torch.get_float32_matmul_precision()
    X = torch.ones(2, 2, dtype=dtype)
    seen = []

    def fail(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        raise MemoryError

    monkeypatch.setattr(torch.Tensor, "addmm_", fail)
    with pytest.raises(MemoryError):
        Hessian().add(X)
    assert seen == [precision]
    assert torch.get_float32_matmul_precision() == before


def added(statistic, X):
    statistic.add(X)
    return statistic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_centred_hessian_is_positive_definite_where_inputs_hardly_vary(dtype):
    X = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) * 1e-3 + torch.linspace(1, 50, 64)
    X[:, 3], X[:, 4] = 0, 7
    X = X.to(dtype)
    statistic = added(Hessian(), X)
    plain = statistic.mean()
    centred = statistic.centred(added(Means(), X))
    assert torch.equal(centred.mean(), centred.mean().t())
    assert centred.mean()[3, 3] == 0  # still a dead input
    assert torch.linalg.eigvalsh(centred.mean().double() + 1e-9 * torch.eye(64)).min() > 0
    assert torch.equal(statistic.mean(), plain)
    assert centred is statistic.centred(added(Means(), X))  # with what was factorised
    statistic.add(X)
    assert centred is not statistic.centred(added(Means(), X))
