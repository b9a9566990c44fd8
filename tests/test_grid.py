"""grid=true: many cells in one pass, each the same as a run of its own."""

import json
import shutil

import pytest
from conftest import compose_config
from hydra.utils import instantiate
from support.engine import IDS, engine_of
from support.families import FAMILIES
from support.presets import NAMES, make_pruner, supported
from support.runs import stripped

from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.experiment.build import build
from nnprune.experiment.command_line import gather_grid, is_grid
from nnprune.experiment.job import Job
from nnprune.method import Method
from nnprune.patterns import parse_pattern
from nnprune.pruners.wanda import Wanda
from nnprune.records import read_all, read_completed
from nnprune.run import run, run_grid, show_estimate

CELLS = [(pruner, sparsity) for pruner in ("magnitude", "wanda", "sparsegpt") for sparsity in ("0.5", "2:4")]


def configs(tiny_config, *overrides, cells=CELLS):
    return [tiny_config(f"pruner={p}", f"sparsity={s}", "propagate=dense", *overrides) for p, s in cells]


def test_cells_equal_separate_runs(tiny_config, tmp_path):
    separate = [run(cfg) for cfg in configs(tiny_config, f"outputs={tmp_path / 'separate'}")]
    together = run_grid(configs(tiny_config))
    assert len({record.metrics["text_perplexity"] for record in together}) == len(CELLS)
    for one, other in zip(separate, together, strict=True):
        assert one.metrics == other.metrics
        assert one.dense_metrics == other.dense_metrics
        assert one.fingerprint == other.fingerprint
        assert [one.linear_sparsity, one.model_sparsity] == [other.linear_sparsity, other.model_sparsity]
        for first, second in zip(stripped(one.per_linear), stripped(other.per_linear), strict=True):
            assert first == second | {"relative_error": pytest.approx(second["relative_error"])}  # other batches of rows
        assert not one.notes
        assert "5 other cells" in other.notes[0]
        assert "total" in one.seconds and "total" not in other.seconds
        assert one.peak_host_bytes and other.peak_host_bytes is None


def test_the_calibration_goes_through_the_layers_once(tiny_config, monkeypatch):
    run(tiny_config("sparsity=dense"))
    calls = []
    forward = HiddenStates.run
    monkeypatch.setattr(HiddenStates, "run", lambda self, *a: calls.append(self.ids.shape[0]) or forward(self, *a))
    run_grid(configs(tiny_config, cells=CELLS[:1]))
    alone = len(calls)
    calls.clear()
    run_grid(configs(tiny_config, "seed=1"))
    evaluation = 5  # windows; the calibration has 6 rows, or for magnitude's few tokens fewer
    assert sum(rows != evaluation for rows in calls) <= 3 * alone
    assert sum(rows == 6 for rows in calls) == 2 * (2 + 1)  # 2 layers, in 2 batches, and a probe of shared inputs


def test_finished_cells_are_left_alone_and_interrupted_ones_go_on(tiny_config, monkeypatch, caplog):
    cfgs = configs(tiny_config, cells=CELLS[:3])
    first = run(cfgs[0])
    seen = []
    original = PruningPass.__init__
    monkeypatch.setattr(
        PruningPass, "__init__", lambda self, engine, cells, *a: seen.append(len(cells)) or original(self, engine, cells, *a)
    )
    caplog.set_level("INFO", "nnprune")
    records = run_grid(cfgs)
    assert records[0].finished == first.finished
    assert caplog.text.count("finished already, nothing to do") == 1
    assert seen[0] == 2
    seen.clear()
    run_grid(configs(tiny_config, "overwrite=true", cells=CELLS[:3]))
    assert seen[0] == 3


@pytest.mark.parametrize("pruners", [["wanda"], ["wanda", "magnitude"]])
def test_grid_needs_dense_propagation(pruners, tiny_config):
    with pytest.raises(ValueError, match=r"propagate=pruned: .*set propagate=dense"):
        run_grid([tiny_config(f"pruner={name}") for name in pruners])


def test_each_cell_needs_dense_propagation(tiny_config):
    with pytest.raises(ValueError, match=r"propagate=pruned: .*set propagate=dense"):
        run_grid([tiny_config("pruner=sparsegpt_nnpruning"), tiny_config("pruner=wanda")])


def test_a_grid_refuses_to_tune_layers(tiny_config):
    cells = [tiny_config(f"pruner={name}", "propagate=dense", "recover=layer") for name in ("wanda", "magnitude")]
    with pytest.raises(ValueError, match=r"grid=true: prunes all cells in one pass, and \w+ tunes layers \(recover\)"):
        run_grid(cells)
    with pytest.raises(ValueError, match="grid=true: prunes all cells"):
        show_estimate(cells)


@pytest.mark.parametrize("value", ["grid=yes", "grid=3"])
def test_another_value_of_grid_is_an_error(value, tiny_config):
    with pytest.raises(ValueError, match=r"grid=(yes|3|True): write grid=true"):
        is_grid(tiny_config(value))
    assert not is_grid(tiny_config("grid=false"))
    assert is_grid(tiny_config("grid={}")), "without a sweep it is a grid of one cell, and needs propagate=dense"


def test_command_line():
    assert gather_grid(["pruner=a,b", "seed=1"]) == ["pruner=a,b", "seed=1"]
    gathered = gather_grid(["-m", "grid=true", "pruner=a,b", "sparsity=0.5,2:4", "seed=1,2"])
    assert gathered == ["-m", "seed=1,2", "pruner=a", "sparsity=0.5", "grid={pruner:['a','b'],sparsity:['0.5','2:4']}"]
    assert gather_grid(["grid=true", "pruner=a"]) == ["pruner=a", "grid={pruner:['a']}"]


def test_a_sweep_on_the_command_line(call_main, tiny_model_dir, small_text, tmp_path):
    arguments = [
        *("model=local", f"model.path={tiny_model_dir}", "calibration=text", f"calibration.path={small_text}"),
        *("calibration.num_samples=2", "calibration.seq_len=32", "evaluation=text", f"evaluation.path={small_text}"),
        *("evaluation.seq_len=32", "evaluation.max_windows=2", f"outputs={tmp_path}", "propagate=dense", "grid=true"),
    ]
    status, text = call_main("-m", *arguments, "pruner=magnitude,wanda", "sparsity=0.7,2:4")
    assert status == 0, text
    records, problems = read_all(tmp_path)
    assert not problems
    cells = sorted((record["pruner"], record["sparsity"]) for record in records if record["pruner"] != "dense")
    assert cells == [("magnitude", "0.7"), ("magnitude", "2:4"), ("wanda", "0.7"), ("wanda", "2:4")]
    assert all(json.dumps(record["config"]["grid"]) == "null" for record in records)
    for record in records:
        command = record["command"].split()
        assert not any(one.startswith("grid=") for one in command)
        assert f"sparsity={record['sparsity']}" in command
        assert record["pruner"] == "dense" or f"pruner={record['pruner']}" in command
    assert call_main(*arguments, "pruner=magnitude,wanda", "sparsity=0.7,2:4") == (0, "")
    assert read_all(tmp_path) == (records, problems), "all were finished already"


def test_a_method_that_breaks_stops_no_other_cell(tiny_config, monkeypatch):
    def fail(*_):
        raise IndexError("list index out of range")

    monkeypatch.setattr(Wanda, "score", fail)
    cfgs = configs(tiny_config, cells=[("wanda", "0.5"), ("magnitude", "0.5"), ("magnitude", "2:4")])
    with pytest.raises(IndexError, match="list index out of range"):
        run_grid(cfgs)
    records = [record for record in read_all(cfgs[0].outputs)[0] if record["pruner"] != "dense"]
    assert sorted(record["status"] for record in records) == ["completed", "completed", "failed"]


def test_the_dense_model_is_measured_once(tiny_config, monkeypatch):
    measured, finish = [], Job._finish

    def note(self, record, experiment):
        measured.append(experiment.is_dense)
        finish(self, record, experiment)

    monkeypatch.setattr(Job, "_finish", note)
    cfgs = configs(tiny_config, cells=CELLS[:3])
    shutil.rmtree(build(cfgs[0]).dense().folder, ignore_errors=True)
    run_grid(cfgs)
    assert sorted(measured) == [False] * 3 + [True]


def test_a_dense_model_that_failed_to_be_measured_is_measured_by_the_next_cell(tiny_config, monkeypatch):
    cfgs = configs(tiny_config, "evaluation.max_windows=4", cells=CELLS[:3])
    expected = run(tiny_config("sparsity=dense", "evaluation.max_windows=4", "seed=7")).metrics
    finish, failed = Job._finish, []

    def fail_once(self, record, experiment):
        if experiment.is_dense and not failed:
            failed.append(1)
            raise OSError("disk full")
        finish(self, record, experiment)

    monkeypatch.setattr(Job, "_finish", fail_once)
    shutil.rmtree(build(cfgs[0]).dense().folder)
    with pytest.raises(OSError, match="disk full"):
        run_grid(cfgs)
    assert read_completed(build(cfgs[0]).dense().folder).metrics == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_every_method(family, tmp_path):
    engine = engine_of(FAMILIES[family](), tmp_path)
    cells = []
    for name in NAMES:
        pattern = parse_pattern("2:4" if supported(name, "2:4") else "0.5")
        method = Method(make_pruner(name), update=instantiate(compose_config(f"pruner={name}")["update"]))
        plan = dict.fromkeys(engine.decoder.shapes(), pattern)
        cells.append(PruneTask(method, plan, LayerFiles(tmp_path / name, engine.decoder.path)))
    PruningPass(engine, cells, "dense").run(IDS)
    for cell in cells:
        for index in range(engine.num_layers):
            weights = cell.layer_files.read(index)
            prefix = f"{engine.decoder.path}.{index}."
            for name, view in engine.decoder.weights(index).items():
                weight = weights[f"{name.removeprefix(prefix)}.weight"]
                cell.plan[name].check(view.within(weight))
