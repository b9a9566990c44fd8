"""What a sweep says at its end, and what a run returns to a sweeper. Under other launchers: test_sweep_command.py."""

from datetime import datetime
from itertools import count
from types import SimpleNamespace

import pytest

from nnprune.experiment import sweep_table
from nnprune.experiment.build import build
from nnprune.records import RunRecord
from nnprune.run import _main


def entry(name, value):
    return {"name": name, "metrics": {f"{name}_perplexity": value}, "dense_metrics": {}, "tokens": ""}


@pytest.fixture
def fake_run(monkeypatch):
    """Runs that measure nothing: `fake_run(perplexity)` says what a config gives."""

    def use(perplexity):
        def run(cfg):
            experiment = build(cfg)
            record = RunRecord("completed", experiment.fingerprint, "demo", experiment.label, str(experiment.pattern))
            figures = {"other": 1.0, **{name: perplexity(cfg) for name in experiment.evaluations if name != "other"}}
            record.add_evaluations({name: entry(name, value) for name, value in figures.items()})
            sweep_table.note(cfg, "skipped" if cfg.pruner.get("damping") == 0.5 else "done", record)
            return record

        monkeypatch.setattr("nnprune.run.run", run)

    return use


def test_the_table_says_what_came_of_each_run(call_main, monkeypatch, fake_run):
    fake_run(lambda cfg: float(cfg.pruner.damping) * 10)
    shown = []
    monkeypatch.setattr(sweep_table, "print", lambda *lines, **_: shown.extend("\n".join(lines).split("\n")), raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    status, _ = call_main("-m", "pruner.damping=0.2,0.5,0", "sparsity=0.5,3:7")
    assert status == 1
    table = [line.split() for line in shown if line]
    assert table[0] == ["sweep:", "6", "runs,", "2", "done,", "2", "skipped,", "2", "failed"]
    assert table[1] == ["#", "sparsity", "pruner.damping", "demo_perplexity"]
    assert table[2] == ["\033[1m0", "0.5", "0.2", "2", "done\033[0m"]
    assert table[4] == ["2", "0.5", "0.5", "5", "skipped"]
    assert table[6][:5] == ["4", "0.5", "0", "--", "failed:"]
    assert "pruner.damping=0: must be a number greater than 0" in " ".join(table[6])


@pytest.fixture
def table(call_main, monkeypatch):
    """`table("seed=0,1", ...)`: the lines that a sweep shows at its end, each in words."""
    shown = []
    monkeypatch.setattr(sweep_table, "print", lambda *lines, **_: shown.extend("\n".join(lines).split("\n")), raising=False)

    def lines(*arguments):
        shown.clear()
        call_main("-m", *arguments)
        return [line.split() for line in shown if line]

    return lines


def test_each_cell_of_a_grid_has_a_row(table, monkeypatch):
    def run(cfg, keep_layers):
        if "Magnitude" in cfg.pruner._target_:
            sweep_table.note(cfg, "failed", error="no luck")
            raise ValueError("no luck")
        sweep_table.note(cfg, "done", RunRecord("completed", "f", "demo", cfg.label, str(cfg.sparsity)))

    monkeypatch.setattr("nnprune.run.run", run)
    monkeypatch.setattr("nnprune.experiment.reuse.reusable_record", lambda _: True)
    grid = ("grid=true", "propagate=dense", "pruner=magnitude,wanda", "sparsity=0.5,2:4", "label=mine")
    rows = table(*grid, "seed=0,1")
    assert rows[0] == ["sweep:", "8", "runs,", "4", "done,", "4", "failed"]
    assert [row[:4] for row in rows[1:]] == [
        ["#", "pruner", "sparsity", "seed"],
        *([job, pruner, sparsity, job] for job in "01" for pruner in ("magnitude", "wanda") for sparsity in ("0.5", "2:4")),
    ]


def test_pruners_that_an_experiment_gives_one_label_are_told_apart():
    def row(job, option):
        settings = {"pruner": "mine", "model": "demo", "sparsity": "0.5"}
        outcome = {"status": "done", "metric": "demo_perplexity", "value": 3.0, "error": "", "whole_model": False}
        return {"job": job, "cell": "", "settings": settings, "option": option, **outcome}

    lines = sweep_table._lines([row(0, "magnitude"), row(1, "wanda")], False)
    assert [line.split()[:2] for line in lines] == [["#", "pruner"], ["0", "magnitude"], ["1", "wanda"]]


def test_sweeps_that_start_in_the_same_second_share_no_folder(table, fake_run, monkeypatch, tmp_path):
    microseconds = count()
    clock = SimpleNamespace(now=lambda: datetime(2026, 1, 1, microsecond=next(microseconds)))
    monkeypatch.setattr("hydra.core.utils.datetime", clock)
    fake_run(lambda cfg: 3.0)
    for seeds in ("seed=0,1", "seed=2,3,4"):
        assert table(seeds)[0][:3] == ["sweep:", str(seeds.count(",") + 1), "runs,"]
    assert sorted(len(list(folder.rglob(sweep_table.FILE))) for folder in (tmp_path / "outputs" / ".hydra").iterdir()) == [2, 3]


def test_nothing_is_said_of_a_single_run(call_main, capsys, fake_run):
    fake_run(lambda cfg: 3.0)
    assert call_main() == (0, "")
    assert "sweep:" not in capsys.readouterr().out


def test_a_run_returns_its_objective(tiny_config, fake_run):
    fake_run(lambda cfg: 3.0)
    assert _main(tiny_config("label=x")) == 3.0, "the other perplexity is of an earlier run"
    cfg = tiny_config("label=x")
    cfg.evaluation.datasets = {"other": {"path": cfg.evaluation.path}}
    cfg.objective = "other_perplexity"
    assert _main(cfg) == 1.0


def test_an_objective_that_is_not_measured_is_refused(tiny_config):
    with pytest.raises(
        ValueError, match=r"objective=txt_perplexity: is not measured by evaluation; did you mean text_perplexity"
    ):
        build(tiny_config("objective=txt_perplexity"))


def test_optuna_optimises_and_survives_a_failed_run(call_main, fake_run, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the sweeper's extra")
    fake_run(lambda cfg: (float(cfg.pruner.damping) - 0.03) ** 2)
    shown = []
    monkeypatch.setattr(sweep_table, "print", lambda *lines, **_: shown.extend(lines), raising=False)
    trials = ("hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1")
    status, text = call_main("-m", "hydra/sweeper=optuna", *trials, "pruner.damping=interval(-0.05,0.1)")
    assert status == 1, "some dampings are negative, and refused"
    assert "pruner.damping=-0.0" in text
    assert "sweep: 4 runs, 2 done, 2 failed" in shown[0]


def test_a_sweeper_that_is_not_installed_says_what_brings_it(call_main, monkeypatch):
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # which registers those that are
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["sweeper"], "optuna.yaml", raising=False)
    status, message = call_main("-m", "hydra/sweeper=optuna", "seed=0,1")
    assert (status, message) == (1, "Error: hydra/sweeper=optuna: is not installed; pip install 'nnprune[optuna]'")


def test_the_best_is_not_sought_among_methods_that_tune_the_whole_model():
    settings = {"model": "demo", "sparsity": "2:4"}
    values = [(3.0, False), (2.0, False), (1.0, True)]
    rows = [{"metric": "perplexity", "value": value, "whole_model": whole, "settings": settings} for value, whole in values]
    assert [sweep_table._is_best(row, rows) for row in rows] == [False, True, False]
