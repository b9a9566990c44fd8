"""Layer files: what is damaged is done again, with one line, to the same figures."""

import json

import pytest
import torch
from support.runs import stripped

from nnprune.engine.layer_files import LayerFiles
from nnprune.evaluation import Perplexity
from nnprune.experiment.build import build
from nnprune.run import run

REPORT = {"linears": [], "zeros": 1}


def written(folder, count=3):
    files = LayerFiles(folder, "layers")
    for index in range(count):
        files.write(index, {"w": torch.full((4, 4), float(index))}, {**REPORT, "zeros": index})
    return files


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


def swap(path):
    other = path.with_name(path.name.replace("0001", "0002"))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_what_is_written_is_read(tmp_path):
    files = written(tmp_path)
    again = LayerFiles(tmp_path, "layers")
    assert again.reports == files.reports
    assert torch.equal(again.read(2)["w"], torch.full((4, 4), 2.0))


@pytest.mark.parametrize("damage", [cut, flip, remove, swap], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_a_damaged_layer_and_later_ones_are_as_good_as_absent(damage, kind, tmp_path, caplog):
    written(tmp_path)
    damage(tmp_path / f"layer-0001.{kind}")
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert list(LayerFiles(tmp_path, "layers").reports) == [0]
    is_silent = kind == "json" and damage is remove  # its presence means "finished"
    assert len(caplog.messages) == (0 if is_silent else 1)


def test_two_layers_whose_files_changed_places_are_pruned_again(tmp_path):
    written(tmp_path)
    for kind in ("safetensors", "json"):
        swap(tmp_path / f"layer-0001.{kind}")
    assert list(LayerFiles(tmp_path, "layers").reports) == [0]


@pytest.mark.parametrize("name", ["layer-0000.safetensors", "layer-0000.json", "allocation.json", "dense_metrics.json"])
def test_a_resumed_run_with_a_damaged_file_has_the_same_figures(name, tiny_config, tmp_path, monkeypatch):
    settings = ("pruner=sparsegpt", "allocation=owl")
    whole = run(tiny_config(*settings, f"outputs={tmp_path / 'whole'}"))
    cfg, measured = tiny_config(*settings), []
    measure = Perplexity.measure

    def stop_at_the_pruned_model(self, *arguments):
        measured.append(self)
        if len(measured) == 2:
            raise RuntimeError("stopped")
        return measure(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(Perplexity, "measure", stop_at_the_pruned_model)
        run(cfg)
    [path] = (build(cfg).folder.parent.parent).rglob(f"unfinished/{name}")
    if name.endswith(".json"):
        path.write_text(json.dumps({"sha256": "0" * 64, "content": {"OWL": 1}}))
    else:
        flip(path)
    resumed = run(cfg)
    assert resumed.metrics == whole.metrics
    assert resumed.dense_metrics == whole.dense_metrics
    assert stripped(resumed.per_linear) == stripped(whole.per_linear)
