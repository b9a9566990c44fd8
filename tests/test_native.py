"""The kernels in C against float64, whatever the shape and the number of threads; and life without a compiler."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nnprune.native import kernels, library, solving
from nnprune.patterns import keep_largest
from nnprune.provenance import versions
from nnprune.pruners import sparsegpt_native, sparsegpt_triton
from nnprune.runtime import Runtime
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


SCORES = [0.0, -0.0, 1.0, -1.5, 3e-42, torch.inf, -torch.inf]


@pytest.mark.skipif(library.library() is None, reason="this machine compiles no C")
@settings(max_examples=60)
@given(
    data=st.data(), groups=st.integers(1, 5), width=st.integers(1, 3000), share=st.floats(0, 1), kind=st.sampled_from("sdtn")
)
def test_the_kth_smallest_is_found(data: st.DataObject, groups: int, width: int, share: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(width)
    scores = torch.randn(groups, width, generator=generator)
    if kind == "s":
        scores = scores.square() * 1e-3
    elif kind == "t":  # few values, so that almost everything is a tie
        scores = torch.tensor(SCORES)[torch.randint(len(SCORES), scores.shape, generator=generator)]
    elif kind == "n":
        scores.view(-1)[data.draw(st.integers(0, scores.numel() - 1))] = torch.nan
    k = max(round(share * width), 1)
    values, spoilt = solving.kth_smallest(scores, k)
    ordered = scores.sort(dim=1).values  # NaN last
    assert torch.equal(values.nan_to_num(nan=7), ordered[:, k - 1].nan_to_num(nan=7))
    wanted = ((scores <= values[:, None]).sum(1) > k) | scores.isnan().any(1)
    assert torch.equal(spoilt, wanted)


@pytest.mark.skipif(library.library() is None, reason="this machine compiles no C")
@pytest.mark.parametrize("step", [1e-6, 0.5])
@pytest.mark.parametrize(("num_keep", "width"), [(250, 600), (2, 4), (4, 8), (1, 3), (31, 32), (0, 5)])
def test_masks_are_those_of_a_selection_by_index(
    num_keep: int, width: int, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = (torch.randn(4200, generator=torch.Generator().manual_seed(0)) / step).round() * step
    scores[5], scores[100:104], scores[200:232] = torch.nan, torch.inf, torch.nan
    scores = scores[: len(scores) // width * width].view(-1, width)
    kept = keep_largest(scores, num_keep)
    assert (kept.sum(1) == num_keep).all()
    monkeypatch.setattr(library, "_is_enabled", False)
    assert torch.equal(kept, keep_largest(scores, num_keep))


@needs_bfloat16
@settings(max_examples=30)
@given(
    groups=st.integers(1, 20),
    outputs=st.integers(1, 120),
    pattern=st.sampled_from([None, (2, 4), (4, 8), (1, 3), (30, 32)]),
    odd=st.integers(0, 1),
)
def test_a_step_of_admm(groups: int, outputs: int, pattern: tuple[int, int] | None, odd: int) -> None:
    generator = torch.Generator().manual_seed(0)
    n, m = pattern or (0, 0)
    inputs = groups * m if pattern else 2 * groups + odd
    total, E, B0 = torch.randn(3, inputs, outputs, generator=generator)
    thresholds = None if pattern else torch.rand(outputs, generator=generator)
    found = total.clone()
    right = solving.admm_step(found, E, B0, thresholds, n, m, 0.5, 0.75, -0.25)
    T = total + 0.5 * E
    groups_of_T = T.abs().unflatten(0, (-1, m)) if pattern else None
    kept = (groups_of_T >= groups_of_T.topk(n, dim=1).values[:, -1:]).flatten(0, 1) if pattern else T.abs() > thresholds
    wanted = B0 + 0.75 * torch.where(kept, 0, T)
    torch.testing.assert_close(found, wanted)
    identity, product = torch.eye(inputs).bfloat16(), torch.empty(inputs, outputs)
    kernels.add_product(product, kernels.pack(identity), right, keep=False)
    torch.testing.assert_close(product, -0.25 * 0.5 * E + torch.where(kept, T, 0) - wanted, rtol=2**-8, atol=1e-6)


@needs_bfloat16
@settings(max_examples=30)
@given(inputs=st.integers(1, 90), outputs=st.integers(1, 70), num_steps=st.integers(1, 4), seed=st.integers(0, 99))
def test_conjugate_gradients(inputs: int, outputs: int, num_steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(inputs + 5, inputs, generator=generator).double()
    A = root.t() @ root / inputs + torch.eye(inputs)
    B, residual = torch.randn(2, inputs, outputs, generator=generator)
    B[torch.rand(B.shape, generator=generator) < 0.5] = 0
    B[:, 0] = 0  # no support at all
    wanted, left, support = B.double(), torch.where(B != 0, residual, 0).double(), B != 0
    direction = left.bfloat16().double()
    search = solving.ConjugateGradients(B, residual)
    for _ in range(num_steps):
        found = torch.empty(inputs, outputs)
        kernels.add_product(found, kernels.pack(torch.eye(inputs).bfloat16()), search.direction, keep=False)
        torch.testing.assert_close(found.double(), direction, rtol=2**-7, atol=1e-4)
        direction = found.double()  # as the kernel has rounded it
        product = A @ direction
        search.step(product.float())
        norm = left.square().sum(0)
        step = (norm / (direction * product).sum(0)).nan_to_num(0, 0, 0)
        wanted += step * direction
        left = torch.where(support, left - step * product, 0)
        direction = left + direction * (left.square().sum(0) / norm).nan_to_num(0, 0, 0)
    torch.testing.assert_close(B.double(), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal((B != 0) & ~support, torch.zeros_like(support))


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
        output = kernels.causal_attention(query, key, value, 0.125)
        found.append((total, weight, errors, output))
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


def test_on_cuda_none_is_compiled_or_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(library, "_load", lambda: pytest.fail("loaded"))
    try:
        Runtime(device="cuda:0").start(seed=0)
        assert library.library() is None
        monkeypatch.setattr(sparsegpt_triton, "available", lambda: False)
        assert versions("cuda")["kernels"] == "PyTorch"
        monkeypatch.setattr(sparsegpt_triton, "available", lambda: True)
        assert versions("cuda")["kernels"] == "Triton"
        assert versions("cpu")["kernels"] == "PyTorch"
    finally:
        library.enable(True)


def test_the_kernels_of_a_cpu_are_recorded() -> None:
    assert versions("cpu")["kernels"] == ("PyTorch" if library.library() is None else "C")
