"""Layer files: written behind the computation; what is damaged is as good as absent. test_resume.py has whole runs."""

import errno
import math
import threading

import pytest
import torch
from support.damages import cut, flip, remove, swap

import nnprune.engine.layer_files
from nnprune.engine.layer_files import LayerFiles

REPORT = {"linears": [], "zeros": 1}


def write(files, index):
    files.write(index, lambda: {"w": torch.full((4, 4), float(index))}, {**REPORT, "zeros": index})


def written(folder, count=3):
    files = LayerFiles(folder, "layers")
    for index in range(count):
        write(files, index)
    files.finish()
    return files


@pytest.fixture
def gate(monkeypatch):
    """An event: until it is set, no file is written."""
    may_write, save = threading.Event(), nnprune.engine.layer_files.save_atomically

    def save_later(state, path):
        assert may_write.wait(60)
        save(state, path)

    monkeypatch.setattr(nnprune.engine.layer_files, "save_atomically", save_later)
    yield may_write
    may_write.set()


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


def test_writing_is_at_most_two_layers_behind(tmp_path, gate):
    files = LayerFiles(tmp_path, "layers")
    for index in range(2):
        write(files, index)
    assert 1 in files and not list(tmp_path.iterdir())
    third = threading.Thread(target=write, args=(files, 2))
    third.start()
    third.join(0.1)
    assert third.is_alive(), "the third waits for the first"
    gate.set()
    third.join(60)
    assert (tmp_path / "layer-0000.json").exists()
    files.finish()
    assert LayerFiles(tmp_path, "layers").reports == files.reports


def test_who_reads_a_layer_waits_for_its_file(tmp_path, gate):
    files = LayerFiles(tmp_path, "layers")
    write(files, 0)
    threading.Timer(0.05, gate.set).start()
    assert torch.equal(files.read(0)["w"], torch.zeros(4, 4))
    assert list(LayerFiles(tmp_path, "layers").reports) == [0]


@pytest.mark.parametrize("when", ["next write", "end"])
def test_an_error_of_the_thread_is_raised_once_where_the_run_hears_it(when, tmp_path, monkeypatch):
    def full(state, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nnprune.engine.layer_files, "save_atomically", full)
    files = LayerFiles(tmp_path, "layers")
    write(files, 0)
    files._files._thread.submit(lambda: None).result()  # the thread has failed by now
    with pytest.raises(OSError, match=r"decoder layer 0 could not be saved in .*\(No space left on device\); make room"):
        write(files, 1) if when == "next write" else files.finish()
    files.settle()
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_thread_beside_another_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(nnprune.engine.layer_files, "save_atomically", lambda *_: (tmp_path / "missing" / "file").touch())
    files = LayerFiles(tmp_path, "layers")
    write(files, 0)
    files.settle()
    assert "warning: outputs: decoder layer 0 could not be saved" in caplog.text


def test_layers_stay_in_memory_until_a_minute_would_be_lost(tmp_path):
    now = [0]
    files = LayerFiles(tmp_path, "layers", interval=60, clock=lambda: now[-1])
    for index, seconds in enumerate((20, 40, 59)):
        now.append(seconds)
        write(files, index)
    files.finish()
    assert not list(tmp_path.iterdir())
    assert torch.equal(files.read(1)["w"], torch.ones(4, 4))
    now.append(60)
    write(files, 3)
    now.append(119)
    write(files, 4)
    files.finish()
    found = LayerFiles(tmp_path, "layers")
    assert list(found.reports) == [0, 1, 2, 3]
    assert all(torch.equal(files.read(index)["w"], found.read(index)["w"]) for index in range(4))
    assert torch.equal(files.read(4)["w"], torch.full((4, 4), 4.0))


def test_never_means_never(tmp_path):
    files = LayerFiles(tmp_path, "layers", interval=math.inf, clock=iter((0, 1e9)).__next__)
    write(files, 0)
    files.finish()
    assert not list(tmp_path.iterdir())
