"""The largest scores of each row: how ties and NaN are settled, by which way of selecting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import HostReads, set_work_sizes

from nnprune.kernels.selection import _keep_by_histogram, keep_largest

hypothesis_settings = settings(max_examples=60)


@pytest.mark.parametrize("num_keep", [0, 1, 4, 5, 7, 8])
def test_keep_largest_with_all_scores_equal(num_keep):
    assert keep_largest(torch.zeros(3, 8), num_keep).sum(1).tolist() == [num_keep] * 3


@pytest.mark.parametrize("step", [1e-6, 0.5])
@pytest.mark.parametrize(("num_keep", "width"), [(250, 600), (2, 4), (4, 8), (1, 3), (31, 32), (0, 5)])
def test_ties_and_nan_are_settled_by_index_in_groups_of_any_size(num_keep, width, step):
    scores = (torch.randn(4200, generator=torch.Generator().manual_seed(0)) / step).round() * step
    scores[5], scores[100:104], scores[200:232] = torch.nan, torch.inf, torch.nan
    scores = scores[: len(scores) // width * width].view(-1, width)
    drop = scores.topk(width - num_keep, largest=False, sorted=False).indices
    assert torch.equal(keep_largest(scores, num_keep), torch.ones_like(scores, dtype=torch.bool).scatter_(1, drop, False))


@hypothesis_settings
@given(
    st.one_of(
        st.lists(st.sampled_from([-2.0, -0.5, 0.0, 1.0, 1.0 + 2**-20, math.inf, math.nan]), min_size=2, max_size=40),
        st.lists(st.floats(width=32), min_size=2, max_size=40),
    ),
    st.data(),
)
def test_the_selection_by_histogram_keeps_the_largest(values, data):
    """It is for CUDA, and runs anywhere."""
    scores = torch.tensor(values, dtype=torch.float32)[None]
    num_keep = data.draw(st.integers(1, len(values) - 1))
    kept = torch.ones_like(scores, dtype=torch.bool)
    _keep_by_histogram(scores, kept, num_keep)
    assert kept.sum() == num_keep
    order = scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    assert order[kept].min() >= order[~kept].max()


def test_the_selection_by_histogram_settles_ties_by_index():
    kept = torch.ones(1, 6, dtype=torch.bool)
    _keep_by_histogram(torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 2.0]]), kept, 4)
    assert kept.tolist() == [[True, False, True, False, True, True]]


@pytest.mark.parametrize("n_m", [(1, 4), (2, 4), (4, 8), (3, 16)])
@pytest.mark.parametrize("values", [2, 4, 1000])
def test_small_groups_on_a_device_keep_the_same_but_for_ties(n_m, values, monkeypatch):
    n, m = n_m
    score = torch.randint(0, values, (500, m), generator=torch.Generator().manual_seed(0)).float()
    score[3, 1] = torch.nan
    here = keep_largest(score, n)
    set_work_sizes(monkeypatch, is_asynchronous=True)
    with HostReads() as reads:
        there = keep_largest(score, n)
    assert not reads.counts
    assert (there.sum(1) == n).all() and there[3, 1]
    kept = [torch.where(mask, score, -1).nan_to_num(2000).sort(1).values for mask in (here, there)]
    assert torch.equal(*kept)
