"""Patterns: what a specification means, exact counts, and a check that is exactly as strict as the mask."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnprune.kernels.selection import keep_largest
from nnprune.patterns import NM, PatternError, Unstructured, keep_where, parse_pattern

GROUPS = ("row", "matrix")
hypothesis_settings = settings(deadline=None, max_examples=60, derandomize=True)


WIDTHS = st.integers(1, 17)


@st.composite
def tied_scores(draw, width=WIDTHS):
    """Scores (O, I) with many ties: a handful of small integers."""
    shape = draw(st.integers(1, 6)), draw(width)
    values = draw(st.lists(st.integers(-1, 2), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return torch.tensor(values, dtype=torch.float32).view(shape)


@pytest.mark.parametrize(
    ("spec", "pattern", "name"),
    [
        (0.5, Unstructured(0.5), "0.5"),
        ("0.5", Unstructured(0.5), "0.5"),
        ("0.50", Unstructured(0.5), "0.5"),
        (" 0.7 ", Unstructured(0.7), "0.7"),
        (".9", Unstructured(0.9), "0.9"),
        (0, Unstructured(0.0), "dense"),
        ("dense", Unstructured(0.0), "dense"),
        ("2:4", NM(2, 4), "2:4"),
        ("4:8", NM(4, 8), "4:8"),
        ("1:3", NM(1, 3), "1:3"),
        ("10:16", NM(10, 16), "10:16"),
    ],
)
def test_parse(spec, pattern, name):
    assert parse_pattern(spec) == pattern
    assert str(parse_pattern(spec)) == name
    assert parse_pattern(name) == pattern


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        (50, "for 50 % write 0.5"),
        ("62.5", "for 62.5 % write 0.625"),
        (70, "for 70 % write 0.7"),
        (-0.1, "0 <= sparsity < 1"),
        (1.0, "0 <= sparsity < 1"),
        (1, "0 <= sparsity < 1"),
        (124, 'quote it: "2:4"'),
        (248, 'quote it: "4:8"'),
        (64, 'quote it: "1:4"'),
        ("4:2", "0 < N < M"),
        ("4:4", "0 < N < M"),
        ("2:0", "0 < N < M"),
        ("0:4", "0 < N < M"),
        ("-1:4", "0 < N < M"),
        ("abc", "a fraction such as 0.5, N:M such as 2:4, or dense"),
        ("", "a fraction such as 0.5, N:M such as 2:4, or dense"),
        ("2:4:8", "a fraction such as 0.5, N:M such as 2:4, or dense"),
        (None, "a fraction such as 0.5, N:M such as 2:4, or dense"),
        ("nan", "0 <= sparsity < 1"),
        ("inf", "0 <= sparsity < 1"),
        ("1e400", "0 <= sparsity < 1"),
    ],
)
def test_bad_specs_name_key_value_and_remedy(spec, remedy):
    with pytest.raises(ValueError, match=f"^sparsity={spec}: ") as caught:
        parse_pattern(spec)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("first", "second"), [(0.1234567, 0.1234568), (0.9999999, 0.99999999)])
def test_different_sparsities_have_different_names(first, second):
    assert str(Unstructured(first)) != str(Unstructured(second))
    assert parse_pattern(str(Unstructured(first))) == Unstructured(first)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 50, math.nan])
def test_unstructured_refuses_what_is_no_fraction(sparsity):
    with pytest.raises(ValueError, match="0 <= sparsity < 1"):
        Unstructured(sparsity)


@pytest.mark.parametrize(
    ("sparsity", "size", "num_zeros"),
    [
        *((0.1, 30, 3), (0.7, 10, 7), (0.29, 100, 29), (0.55, 100, 55), (0.07, 100, 7), (Fraction(1, 3), 9, 3)),
        *((0.5, 5, 3), (0.0, 9, 0), (0.999, 10, 10)),
    ],
)
def test_num_zeros_is_the_exact_ceiling(sparsity, size, num_zeros):
    assert Unstructured(sparsity).num_zeros(size) == num_zeros


@hypothesis_settings
@given(score=tied_scores(), percent=st.integers(0, 99), per=st.sampled_from(GROUPS))
def test_unstructured_counts_are_exact_under_ties(score, percent, per):
    pattern = Unstructured(percent / 100)
    mask = pattern.mask(score, per=per)
    assert mask.shape == score.shape
    assert mask.dtype == torch.bool
    groups = ~mask if per == "row" else (~mask).view(1, -1)
    expected = -(-percent * groups.shape[1] // 100)
    assert groups.sum(1).tolist() == [expected] * len(groups)


@hypothesis_settings
@given(score=tied_scores(), percent=st.integers(1, 99), per=st.sampled_from(GROUPS))
def test_unstructured_keeps_the_largest(score, percent, per):
    mask = Unstructured(percent / 100).mask(score, per=per)
    if per == "matrix":
        score, mask = score.view(1, -1), mask.view(1, -1)
    kept = score.masked_fill(~mask, torch.inf).amin(1)
    dropped = score.masked_fill(mask, -torch.inf).amax(1)
    assert (kept >= dropped).all()


@hypothesis_settings
@given(data=st.data(), m=st.integers(2, 9), num_groups=st.integers(1, 5))
def test_nm_keeps_the_n_largest_of_every_group(data, m, num_groups):
    n = data.draw(st.integers(1, m - 1))
    score = data.draw(tied_scores(width=st.just(m * num_groups)))
    mask = NM(n, m).mask(score)
    groups, keep = score.view(-1, m), mask.view(-1, m)
    assert keep.sum(1).tolist() == [n] * len(groups)
    kept = groups.masked_fill(~keep, torch.inf).amin(1)
    dropped = groups.masked_fill(keep, -torch.inf).amax(1)
    assert (kept >= dropped).all()


@hypothesis_settings
@given(score=tied_scores(width=st.just(12)), pattern=st.sampled_from([Unstructured(0.3), NM(2, 4), NM(2, 3), NM(5, 6)]))
def test_mask_depends_on_the_order_alone_and_not_on_thresholds(score, pattern):
    stretched = score.double().exp() * 1e6 + 3
    assert torch.equal(pattern.mask(stretched), pattern.mask(score.double()))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)])
def test_scores_may_be_stored_by_columns(pattern):
    score = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pattern.mask(score.t().contiguous().t()), pattern.mask(score))
    rest = torch.randn(24, 16, 2, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    assert torch.equal(keep_largest(rest, 1), keep_largest(rest.contiguous(), 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keep_where_keeps_bits_and_leaves_positive_zeros(dtype):
    weight = torch.tensor([[1.5, -2.0, -0.0], [torch.nan, -torch.inf, 3e-8]]).to(dtype).t()  # not contiguous
    mask = torch.tensor([[True, False, True], [True, False, False]]).t()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    kept = keep_where(mask, weight)
    assert torch.equal(kept.view(integers), torch.where(mask, weight, 0).view(integers))


def test_row_and_matrix_are_different_groups():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert Unstructured(0.5).mask(score, per="row").tolist() == [[False, False, True, True]] * 2
    assert Unstructured(0.5).mask(score, per="matrix").tolist() == [[False] * 4, [True] * 4]


@hypothesis_settings
@given(score=tied_scores(), percent=st.integers(1, 99), per=st.sampled_from(GROUPS))
def test_check_accepts_own_masks_and_rejects_one_weight_too_many(score, percent, per):
    pattern = Unstructured(percent / 100)
    weight = pattern.mask(score, per=per).float()
    pattern.check(weight)
    zeros = (weight == 0).nonzero()
    surplus = len(zeros) - pattern.num_zeros(weight.numel())  # rows round up one by one
    for o, i in zeros[: surplus + 1].tolist():
        weight[o, i] = 1e-30
    with pytest.raises(PatternError, match=f"fewer than the {pattern.num_zeros(weight.numel())} that"):
        pattern.check(weight)


@hypothesis_settings
@given(data=st.data(), score=tied_scores(width=st.just(24)), m=st.sampled_from([2, 3, 4, 6, 8, 12, 24]))
def test_nm_check_accepts_own_masks_and_rejects_one_weight_too_many(data, score, m):
    pattern = NM(data.draw(st.integers(1, m - 1)), m)
    weight = pattern.mask(score).float()
    pattern.check(weight)
    pattern.check(torch.zeros_like(weight))
    zeros = (weight == 0).nonzero()
    o, i = zeros[data.draw(st.integers(0, len(zeros) - 1))].tolist()
    weight[o, i] = -1.0
    with pytest.raises(PatternError, match=f"more than {pattern} allows"):
        pattern.check(weight)


def test_a_group_of_m_does_not_lie_across_two_rows():
    weight = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    NM(2, 4).check(weight)
    with pytest.raises(PatternError, match="keeps 2 weights in a group of 2"):
        NM(1, 2).check(weight)


@pytest.mark.parametrize("call", [NM(2, 4).mask, NM(2, 4).check, lambda weight: NM(2, 4).check_width(weight.shape[1])])
def test_m_must_divide_the_width(call):
    with pytest.raises(PatternError, match="has 6 inputs, which the group size 4 of 2:4 does not divide"):
        call(torch.ones(2, 6))


def test_sparsity_of_nm_is_the_fraction_of_zeros():
    assert NM(1, 4).sparsity == 0.75
    assert float(NM(2, 6).mask(torch.rand(3, 12)).logical_not().float().mean()) == pytest.approx(NM(2, 6).sparsity)
