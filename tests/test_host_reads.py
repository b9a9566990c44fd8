"""How often the host waits for the device while a layer is pruned: a CPU stands in for it, where the same operators read."""

import warnings
from pathlib import Path

import pytest
import torch
from conftest import compose_config
from hydra.utils import instantiate
from support.devices import HostReads, set_work_sizes
from support.engine import engine_of, prune, random_ids
from support.families import GROUPED, make_model
from support.presets import NAMES

from nnprune.engine.prune_linears import prune_linears
from nnprune.method import Method
from nnprune.patterns import parse_pattern

GROUPS = 4  # of linears in a layer of Llama: q, k and v; o; gate and up; down
BEFORE = 9  # the layer, when the calibration and the reference start
AT_ONCE = 1 + GROUPS + 1  # what is known of all inputs, of each group's weights, and of the layer's zeros
SEQUENTIAL = 2 * GROUPS + 1
LOOKS = {"refit": 2 * GROUPS, "swaps": 7 * 2, "best_medium": 3 * 6, "best": 3 * 10 + 1 + BEFORE + 2 * (8 + 9)}
"""Of iterations, every few steps; of tuning, in and after each epoch. Copies: which tokens there are, and twice as many sequences.
Logits: one of transformers' own in each forward, of either model, in and after each epoch."""


def prune_layer(name: str, sparsity: str, folder: Path, device: str = "cpu") -> int:
    """Prune a model of one decoder layer as this file of conf/pruner says. Returns how often its tuning was attempted."""
    cfg = compose_config(f"pruner={name}")
    method = Method(*(instantiate(cfg[part], _convert_="all") for part in ("pruner", "target", "update", "recover")))
    engine = engine_of(make_model("Llama", num_hidden_layers=1, **GROUPED)(), folder, device, batch_tokens=64)
    plan = dict.fromkeys(engine.decoder.shapes(), parse_pattern(sparsity))
    [report] = prune(engine, method, plan, random_ids(8, 16), cfg.propagate)
    return report["recovered"]["after"]["attempts"] if "recovered" in report else 1


def looks(name: str) -> int:
    return LOOKS["refit"] if name.endswith("refit") else LOOKS.get(name, 0)


CASES = [(name, "2:4") for name in NAMES] + [(name, "0.5") for name in ("wanda", "sparsegpt", "alps", "dsnot", "swaps")]


@pytest.mark.parametrize(("name", "sparsity"), CASES)
def test_the_host_waits_a_few_times_for_a_layer(name, sparsity, tmp_path, monkeypatch):
    set_work_sizes(monkeypatch, is_asynchronous=True, steps_per_read=4)
    passes = SEQUENTIAL if name in ("best_fast", "best") else AT_ONCE
    with HostReads() as reads:
        attempts = prune_layer(name, sparsity, tmp_path)
    assert passes <= reads.counts.total() <= BEFORE + passes + attempts * looks(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("name", "sparsity"), CASES)
def test_cuda_waits_once_for_each_group_while_its_linears_are_pruned(name, sparsity, tmp_path, monkeypatch):
    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return prune_linears(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr("nnprune.engine.pruning_pass.prune_linears", watched)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attempts = prune_layer(name, sparsity, tmp_path, "cuda")
    assert sum("synchronizing" in str(warning.message) for warning in caught) <= GROUPS + attempts * looks(name)


def test_what_the_host_reads_is_counted():
    tensor = torch.tensor([1.0, 0.0])
    with HostReads() as found:
        bool(tensor[0])
        float(tensor[1])
        tensor.tolist()
        tensor[tensor > 0]
        tensor[tensor > 0] = torch.tensor([2.0])
        tensor.nonzero()
        torch.equal(tensor, tensor)
    assert found.counts.total() == 7
