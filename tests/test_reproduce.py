"""The tables of docs/reproduce.md: what their commands run, and that a killed one goes on (whole: benchmarks/rehearsal.py)."""

import json
import re
from itertools import product

import pytest
from conftest import CONF, ROOT, compose_config
from omegaconf import OmegaConf
from support.fakehub import Hub
from support.records import collect
from support.rehearsal import make_tables_hub, models_of, record_paths, run_table

DOCUMENT = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("experiment", ["opt_table", "llama_table"])
def test_a_table_is_54_pruned_models_and_6_dense_ones(experiment):
    params = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml").hydra.sweeper.params
    groups = [[f"{key}={value}" for value in values.split(",")] for key, values in params.items()]
    cells = set()
    for cell in product(*groups):
        if cell[1:] == tuple(group[0] for group in groups[1:]):  # once a model
            cfg = compose_config(*cell)
            assert (cfg.calibration.num_samples, cfg.calibration.seq_len, cfg.evaluation.seq_len) == (128, 2048, 2048)
            assert cfg.calibration.dataset == "allenai/c4" and list(cfg.evaluation.datasets) == ["wikitext2"]
        is_dense = cell[1] == "sparsity=dense"
        cells.add((cell[0], "dense" if is_dense else cell[1:]))
    assert (len(cells), sum(cell[1] == "dense" for cell in cells)) == (60, 6)
    for model in models_of(experiment):
        assert re.search(rf"^\| {re.escape(model)} \|", DOCUMENT, re.MULTILINE), f"{model} has no estimate"


def test_one_command_killed_and_started_again(tmp_path):
    hub = Hub(make_tables_hub(tmp_path / "hub", ["opt-125m", "opt-350m"]))
    command = ["experiment=opt_table", "model=opt-125m,opt-350m", "pruner=wanda", "sparsity=dense,2:4"]
    killed = run_table(hub, tmp_path, *command, kill_after=1)
    first = {path: path.stat().st_mtime_ns for path in record_paths(tmp_path)}
    assert killed.returncode < 0 and 1 <= len(first) < 4
    done = run_table(hub, tmp_path, *command)
    hub.close()
    assert done.returncode == 0, done.stdout
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    records = [json.loads(path.read_text()) for path in record_paths(tmp_path)]
    assert {(record["model"], record["pruner"], record["sparsity"]) for record in records} == {
        (model, *cell) for model in ("opt-125m", "opt-350m") for cell in (("dense", "dense"), ("wanda", "2:4"))
    }
    assert len(records) == 4 and all(record["status"] == "completed" for record in records)
    out = collect(tmp_path / "outputs", "--metric", "wikitext2_perplexity", "--layout", "models")[1]
    figures = {(r["model"], r["pruner"]): r["metrics"]["wikitext2_perplexity"] for r in records}
    for head, pruner in (("**Dense** | 0%", "dense"), ("**Wanda** | 2:4", "wanda")):
        values = [f"{figures[model, pruner]:.2f}" for model in ("opt-125m", "opt-350m")]
        assert f"| {head} | {values[0]} | {values[1]} |" in out
