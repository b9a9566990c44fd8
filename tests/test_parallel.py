"""Ranks: two processes share out the calibration, and their statistics are those of one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.engine import Witness, engine_of, prune, random_ids
from support.families import FAMILIES

from nnprune.engine import parallel
from nnprune.patterns import NM
from nnprune.statistics import Hessian, Moments, SquaredNorm

X = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
IDS = random_ids(rows=4, seq_len=16)
KINDS = (Hessian, Moments, SquaredNorm)


def accumulated(kind, inputs):
    statistic = kind()
    statistic.add(inputs)
    return statistic


def work(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    assert (parallel.rank(), parallel.world_size()) == (rank, 2)
    assert parallel.all_reduce(torch.tensor(rank + 1.0)) == 3
    share = X[:25] if rank == 0 else X[25:]
    for kind in KINDS:
        statistic = accumulated(kind, share)
        statistic.all_reduce(parallel.all_reduce)
        torch.testing.assert_close(statistic.mean(), accumulated(kind, X).mean())
        assert statistic.num_tokens == len(X)
    dist.destroy_process_group()


def test_two_processes_have_the_statistics_of_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)


def test_one_process_is_alone():
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    one = torch.ones(2)
    assert parallel.all_reduce(one) is one and torch.equal(one, torch.ones(2))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_merge(kind):
    whole, first, second = (accumulated(kind, part) for part in (X, X[:7], X[7:]))
    first.merge(second)
    torch.testing.assert_close(first.mean(), whole.mean())
    assert first.num_tokens == whole.num_tokens
    empty = kind()
    empty.merge(whole)
    torch.testing.assert_close(empty.mean(), whole.mean())
    whole.add(X)
    torch.testing.assert_close(empty.mean(), first.mean())  # a merged sum is its own


def hessians(ids, folder):
    """Linear name -> its Hessian, as a pruner is shown it, in a pass over a whole model."""
    witness, engine = Witness(), engine_of(FAMILIES["llama"](), folder)
    prune(engine, witness, dict.fromkeys(engine.decoder.shapes(), NM(2, 4)), ids)
    return witness.seen


def prune_share(rank, folder):
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(hessians(IDS[2 * rank : 2 * rank + 2], Path(folder) / str(rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_pass_over_a_model_by_two_shows_pruners_what_one_shows_them(tmp_path):
    mp.spawn(prune_share, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = hessians(IDS, tmp_path / "one")
    assert len(expected) == 21 and first.keys() == second.keys() == expected.keys()
    for name, hessian in expected.items():
        torch.testing.assert_close(first[name], hessian, rtol=1e-4, atol=1e-6)
        assert torch.equal(first[name], second[name]), name
