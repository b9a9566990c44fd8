"""The kernels in C against float64, whatever the shape and the number of threads; and life without a compiler."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import SHAPES, random_heads
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from nnprune.native import kernels, library
from nnprune.pruners import sparsegpt_native
from nnprune.statistics import CrossProduct, Hessian

needs_bfloat16 = pytest.mark.skipif(
    not kernels.multiply_bfloat16(torch.ones(1, dtype=torch.bfloat16)),
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
    kernels.add_product(total, kernels.pack(X), kernels.pack(Y))
    scale = X.double().abs().t() @ Y.double().abs() + 1
    assert ((total - 1 - X.double().t() @ Y.double()).abs() / scale).max() < 1e-6
    square = torch.zeros(width, width)
    kernels.add_product(square, kernels.pack(X), kernels.pack(X), lower=True)
    scale = X.double().abs().t() @ X.double().abs()
    assert ((square - X.double().t() @ X.double()).tril().abs() / scale).nan_to_num().max() < 1e-6


@pytest.mark.skipif(library.library() is None, reason="this machine compiles no C")
@settings(max_examples=30)
@given(tokens=st.integers(1, 600), width=st.integers(1, 200), skipped=st.integers(0, 3))
def test_squares_are_summed(tokens: int, width: int, skipped: int) -> None:
    X = random_inputs(tokens, width + skipped)[:, skipped:]
    total = torch.ones(width)
    kernels.add_squares(total, X)
    wanted = X.double().square().sum(0) + 1
    assert ((total - wanted).abs() / wanted).max() < 1e-6


@pytest.mark.skipif(library.library() is None, reason="this machine compiles no C")
@settings(max_examples=30)
@given(tokens=st.integers(1, 20), vocab_size=st.integers(1, 200), scale=st.sampled_from([0.1, 3.0, 100.0]))
def test_negative_log_likelihood(tokens: int, vocab_size: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(tokens, vocab_size + 1, generator=generator)).bfloat16()[:, 1:]
    targets = torch.randint(vocab_size, (tokens,), generator=generator)
    wanted = cross_entropy(logits.double(), targets, reduction="none")
    assert ((kernels.negative_log_likelihood(logits, targets) - wanted).abs() < 1e-6 * (1 + logits.double().abs().max())).all()
    logits[0, vocab_size // 2] = torch.nan
    assert not kernels.negative_log_likelihood(logits, targets)[0].isfinite()


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
    assert not statistic.is_finite()
    query, key, value = (random_inputs(70, 16).view(1, 1, 70, 16).clone() for _ in range(3))
    key[0, 0, 30, 3] = torch.nan
    assert kernels.causal_attention(query, key, value, 0.25).isfinite().all(-1).flatten().tolist() == [True] * 30 + [False] * 40


@needs_bfloat16
def test_layouts_that_cannot_be_read_in_pairs_are_copied() -> None:
    odd = random_inputs(2 * 40, 33)[:, 1:].view(1, 2, 40, 32)
    turned = random_inputs(32, 80).t().reshape(1, 2, 40, 32).mT.contiguous().mT
    wanted = scaled_dot_product_attention(odd.double(), turned.double(), odd.double(), is_causal=True, scale=0.1)
    assert (kernels.causal_attention(odd, turned, odd, 0.1) - wanted).norm() < 0.004 * wanted.norm()


@needs_bfloat16
@settings(max_examples=30)
@given(
    **SHAPES,
    width=st.sampled_from([16, 64, 80, 128]),
    skipped=st.sampled_from([0, 1, 2]),
    scaling=st.sampled_from([0.05, 0.3]),
)
def test_gradients_of_attention(heads: int, shared: int, tokens: int, width: int, skipped: int, scaling: float) -> None:
    inputs = random_heads(heads, shared, tokens, width, width)
    grad = random_heads(heads, shared, tokens, width + skipped, 0, seed=1)[0][..., skipped:]
    log_sums = kernels.room_for_sums(inputs[0])
    output = kernels.causal_attention(*inputs, scaling, log_sums)
    ours = kernels.attention_gradients(*inputs, scaling, output, log_sums, grad)
    exact, theirs = (
        torch.autograd.grad(
            scaled_dot_product_attention(*given, is_causal=True, scale=scaling, enable_gqa=True), given, grad.to(given[0].dtype)
        )
        for given in ([tensor.to(dtype).requires_grad_(True) for tensor in inputs] for dtype in (torch.float64, torch.bfloat16))
    )
    for found, wanted, other in zip(ours, exact, theirs, strict=True):
        assert found.shape == wanted.shape and found.dtype == torch.bfloat16
        assert (found - wanted).norm() < 1.5 * (other - wanted).norm() + 0.004 * wanted.norm() + 1e-5 * grad.norm()


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
        kernels.add_product(total, kernels.pack(X), kernels.pack(X))
        errors = sparsegpt_native.prune_block_nm(weight, torch.eye(64) + torch.ones(64, 64).triu(1) / 9, 2, 4)
        log_sums = kernels.room_for_sums(query)
        output = kernels.causal_attention(query, key, value, 0.125, log_sums)
        gradients = kernels.attention_gradients(query, key, value, 0.125, output, log_sums, query)
        found.append((total, weight, errors, output, log_sums, *gradients))
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As a process begins that has compiled nothing yet; the cache's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._load.cache_clear()
    yield tmp_path / "nnprune"
    library._load.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_pytorch_serves(
    compiler: str, unloaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.INFO):
        assert library.library() is None
        assert not sparsegpt_native.available()
        assert not kernels.multiply_bfloat16(torch.ones(1, dtype=torch.bfloat16))
    assert len(caplog.messages) == 1
    assert "PyTorch serves instead" in caplog.text
    assert not list(unloaded.glob("*"))


def test_they_are_compiled_once_and_no_half_written_file_is_left(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.library() is None:
        pytest.skip("this machine compiles no C")
    (compiled,) = unloaded.glob("*")
    library._load.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    assert library.library() is not None
    assert list(unloaded.glob("*")) == [compiled]


def test_a_setting_turns_them_off() -> None:
    library.enable(False)
    try:
        assert library.library() is None
    finally:
        library.enable(True)
