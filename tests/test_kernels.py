"""The kernels in C against float64, whatever the shape and the number of threads."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nnprune.experiment.provenance import versions
from nnprune.kernels import attention, gram, library, sweep, sweep_triton
from nnprune.runtime import Runtime
from nnprune.statistics import CrossProduct, Hessian

needs_bfloat16 = pytest.mark.skipif(
    not gram.multiply_bfloat16(torch.ones(1, dtype=torch.bfloat16)),
    reason="this CPU has no products of bfloat16, or no compiler",
)


def random_inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs (tokens, width) with features of very different sizes, as those of a language model."""
    X = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return (X * torch.logspace(-2, 1, width)).bfloat16()


@needs_bfloat16
@settings(max_examples=40)
@given(tokens=st.integers(1, 300), width=st.integers(1, 200), other_width=st.integers(1, 120), skipped=st.integers(0, 3))
def test_it_is_the_product(tokens: int, width: int, other_width: int, skipped: int) -> None:
    X = random_inputs(tokens, width + skipped)[:, skipped:]  # rows further apart than they are long
    Y = random_inputs(other_width, tokens, seed=1).t()
    total = torch.ones(width, other_width)
    gram.add_product(total, gram.pack(X), gram.pack(Y))
    scale = X.double().abs().t() @ Y.double().abs() + 1
    assert ((total - 1 - X.double().t() @ Y.double()).abs() / scale).max() < 1e-6
    square = torch.zeros(width, width)
    gram.add_product(square, gram.pack(X), gram.pack(X), lower=True)
    scale = X.double().abs().t() @ X.double().abs()
    assert ((square - X.double().t() @ X.double()).tril().abs() / scale).nan_to_num().max() < 1e-6


@needs_bfloat16
def test_many_tokens_lose_few_digits() -> None:
    X = random_inputs(8192, 100)
    hessian, cross = Hessian(), CrossProduct()
    for part in X.split(2048):
        hessian.add(part)
        cross.add(part, 2 * part)
    wanted = X.double().t() @ X.double() / len(X)
    assert (hessian.mean() - wanted).norm() < 1e-6 * wanted.norm()
    assert (cross.mean() - 2 * wanted).norm() < 1e-6 * 2 * wanted.norm()
    assert torch.equal(hessian.mean(), hessian.mean().t())


@needs_bfloat16
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nothing_hides_what_is_not_finite(bad: float) -> None:
    X = random_inputs(10, 50)
    X[3, 7] = bad
    statistic = Hessian()
    statistic.add(X)
    assert not statistic.finite()
    query, key, value = (random_inputs(70, 16).view(1, 1, 70, 16).clone() for _ in range(3))
    key[0, 0, 30, 3] = torch.nan
    assert (
        attention.causal_attention(query, key, value, 0.25).isfinite().all(-1).flatten().tolist() == [True] * 30 + [False] * 40
    )


@needs_bfloat16
def test_layouts_that_cannot_be_read_in_pairs_are_copied() -> None:
    odd = random_inputs(2 * 40, 33)[:, 1:].view(1, 2, 40, 32)
    turned = random_inputs(32, 80).t().reshape(1, 2, 40, 32).mT.contiguous().mT
    wanted = scaled_dot_product_attention(odd.double(), turned.double(), odd.double(), is_causal=True, scale=0.1)
    assert (attention.causal_attention(odd, turned, odd, 0.1) - wanted).norm() < 0.004 * wanted.norm()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_bfloat16
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    X, (query, key, value) = random_inputs(500, 200), random_inputs(3 * 300, 64).view(3, 1, 2, 150, 64)
    found = []
    for number in (1, 3):
        torch.set_num_threads(number)
        total, weight = torch.zeros(200, 200), random_inputs(64, 99, seed=2).float()
        gram.add_product(total, gram.pack(X), gram.pack(X))
        errors = sweep.prune_block_nm(weight, torch.eye(64) + torch.ones(64, 64).triu(1) / 9, 2, 4)
        output = attention.causal_attention(query, key, value, 0.125)
        found.append((total, weight, errors, output))
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_a_setting_turns_them_off() -> None:
    library.enable(False)
    try:
        assert library.library() is None
    finally:
        library.enable(True)


def test_on_cuda_none_is_compiled_or_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("set_device", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1 << 34))
    monkeypatch.setattr(library, "_load", lambda: pytest.fail("loaded"))
    try:
        Runtime(device="cuda:0").start(seed=0)
        assert library.library() is None
        monkeypatch.setattr(sweep_triton, "available", lambda: False)
        assert versions("cuda")["kernels"] == "PyTorch"
        monkeypatch.setattr(sweep_triton, "available", lambda: True)
        assert versions("cuda")["kernels"] == "Triton"
        assert versions("cpu")["kernels"] == "PyTorch"
    finally:
        library.enable(True)


def test_the_kernels_of_a_cpu_are_recorded() -> None:
    assert versions("cpu")["kernels"] == ("PyTorch" if library.library() is None else "C")
