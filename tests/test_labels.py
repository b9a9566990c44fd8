"""The default label of a method: it names folders, rows of tables and models on the hub."""

import pytest
from hydra import initialize_config_dir

import nnprune
from nnprune.experiment.command_line import composed, label_of
from nnprune.pruners.wanda import Wanda
from nnprune.records import read_all
from nnprune.report.labels import pretty_pruner
from nnprune.run import CONF

EXPERIMENT = """# @package _global_
defaults:
  - override /pruner: wanda
  - override /update: refit
  - override /recover: layer
"""


def label(*overrides, folder=None):
    """The label of the runs of a command line, with a folder of further options."""
    search = [f"hydra.searchpath=[file://{folder}]"] if folder else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return label_of(*composed([*search, *overrides]), overrides)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ("", "sparsegpt"),
        ("pruner=wanda update=refit", "wanda+refit"),
        ("pruner=wanda update=refit recover=none", "wanda+refit"),
        ("pruner=alps recover=window", "alps+window"),
        ("pruner=wanda allocation=owl", "wanda+owl"),
        ("pruner=best", "best"),
        ("pruner=best recover=none", "best+recover=none"),
        ("pruner=best recover=window", "best+window"),
        ("pruner=best recover=layer", "best+layer"),
        ("pruner=wanda_refit", "wanda_refit"),
        ("pruner=custom pruner._target_=mine.Own_int4", "Own_int4"),
    ],
)
def test_what_is_typed(overrides, wanted):
    assert label(*overrides.split()) == wanted


@pytest.mark.parametrize(("bits", "wanted"), [("4", "SparseGPT, 4 bits"), ("3", "SparseGPT, 3 bits"), ("null", "SparseGPT")])
def test_bits(bits, wanted):
    assert pretty_pruner(label("pruner=sparsegpt_int4", f"pruner.bits={bits}")) == wanted


def test_what_an_experiment_file_chooses(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(EXPERIMENT)
    assert label("experiment=mine", folder=tmp_path) == "wanda+refit+layer"
    assert label("experiment=mine", "recover=none", folder=tmp_path) == "wanda+refit"
    assert label("experiment=mine", "pruner=wanda_refit", folder=tmp_path) == "wanda_refit+layer"


def test_an_experiment_file_on_the_command_line(call_main, tiny_model_dir, small_text, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(EXPERIMENT.replace("  - override /recover: layer\n", ""))
    small = [
        *("model=local", f"model.path={tiny_model_dir}", "calibration=text", f"calibration.path={small_text}"),
        *("calibration.num_samples=2", "calibration.seq_len=32", "evaluation=none", "experiment=mine"),
    ]
    assert call_main(f"--config-dir={tmp_path / 'conf'}", *small)[0] == 0
    grid = ("grid=true", "propagate=dense", "pruner=wanda,wanda_refit,magnitude")
    assert call_main(f"hydra.searchpath=[file://{tmp_path / 'conf'}]", *small, *grid)[0] == 0
    labels = sorted(record["pruner"] for record in read_all(tmp_path / "outputs")[0] if record["pruner"] != "dense")
    assert labels == ["magnitude+refit", "wanda+refit", "wanda+refit", "wanda_refit"]


def test_what_goes_with_an_object(tiny_model_dir, small_text, tmp_path):
    small = [
        *("calibration=text", f"calibration.path={small_text}", "calibration.num_samples=2", "calibration.seq_len=32"),
        *("evaluation=none", f"outputs={tmp_path}", "runtime.device=cpu"),
    ]
    prune = {"pruner": Wanda(), "model_name": str(tiny_model_dir)}
    assert nnprune.prune(**prune, overrides=small).pruner == "Wanda"
    assert nnprune.prune(**prune, overrides=[*small, "update=refit"]).pruner == "Wanda+refit"
    assert nnprune.prune(**prune, overrides=[*small, "update=refit", "label=mine"]).pruner == "mine"
