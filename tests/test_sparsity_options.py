"""`sparsity` is spelled the same on the command line, in sweeps, in experiment files and for a shell that completes it."""

import pytest
from conftest import compose_config
from hydra.errors import HydraException

from nnprune.experiment.build import build
from nnprune.records import RunRecord
from nnprune.run import main


@pytest.fixture
def sweep(call_main, tmp_path, monkeypatch):
    """`sweep("sparsity=0.5,2:4", experiment="...")`: the patterns of the runs that a command consists of."""
    patterns = []

    def run(cfg):
        patterns.append(str(build(cfg).pattern))
        return RunRecord("completed", "", "", "", "")

    monkeypatch.setattr("nnprune.run.run", run)

    def patterns_of(*arguments, experiment=None):
        if experiment:
            folder = tmp_path / "conf" / "experiment"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "mine.yaml").write_text(f"# @package _global_\n{experiment}")
            arguments = ("--config-dir", str(folder.parent), "experiment=mine", *arguments)
        patterns.clear()
        assert call_main(*arguments) == (0, "")
        return list(patterns)

    return patterns_of


@pytest.mark.parametrize(
    ("typed", "pattern"),
    [("0.7", "0.7"), ("3:4", "3:4"), ("'2:4'", "2:4"), ("5e-1", "0.5"), (".25", "0.25"), ("0", "dense"), ("dense", "dense")],
)
def test_any_fraction_and_any_nm(typed, pattern):
    assert str(build(compose_config(f"sparsity={typed}")).pattern) == pattern


@pytest.mark.parametrize("values", ["0.3,0.4,2:4", "choice(0.3,0.4,2:4)"])
def test_sweeps(sweep, values):
    assert sweep("-m", f"sparsity={values}") == ["0.3", "0.4", "2:4"]


def test_a_range(sweep):
    assert sweep("-m", "sparsity=range(0.3,0.5,0.1)") == ["0.3", "0.4"]


def test_an_experiment_that_sweeps(sweep):
    params = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      sparsity: 0.3,2:4\n"
    assert sweep(experiment=params) == ["0.3", "2:4"]


@pytest.mark.parametrize("text", ['defaults:\n  - override /sparsity: "2:4"\n', 'sparsity: "2:4"\n'])
def test_an_experiment_of_one_sparsity(sweep, text):
    assert sweep(experiment=text) == ["2:4"]
    assert sweep("sparsity=0.3", experiment=text) == ["0.3"]


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_an_experiment_whose_number_is_not_quoted(sparsity, call_main, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"defaults:\n  - override /sparsity: {sparsity}\n")
    status, message = call_main("--config-dir", str(tmp_path), "experiment=mine")
    assert status == 1
    assert message == 'Error: a defaults list has a number; quote it, as in override /sparsity: "0.5" or "2:4"'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nnprune sparsity=", "sparsity=0.5 sparsity=2:4 sparsity=4:8 sparsity=dense"),
        ("nnprune pruner=wanda sparsity=2", "sparsity=2:4"),
        ("nnprune spars", "sparsity="),
        ("nnprune sparsity=0.5 pruner.damp_", "pruner.damp_inverse="),
    ],
)
def test_completion(line, expected, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setattr("sys.argv", ["nnprune", "-sc", "query=bash"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.strip() == expected


def test_old_names_are_refused():
    with pytest.raises(HydraException):
        compose_config("sparsity.pattern=0.5")
    with pytest.raises(ValueError, match="sparsity=2of4: not a pattern"):
        build(compose_config("sparsity=2of4"))
