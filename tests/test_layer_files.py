"""Layer files: what is damaged is as good as absent, and said in one line. test_resume.py has whole runs."""

import pytest
import torch
from support.damages import cut, flip, remove, swap

from nnprune.engine.layer_files import LayerFiles

REPORT = {"linears": [], "zeros": 1}


def written(folder, count=3):
    files = LayerFiles(folder, "layers")
    for index in range(count):
        files.write(index, {"w": torch.full((4, 4), float(index))}, {**REPORT, "zeros": index})
    return files


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
