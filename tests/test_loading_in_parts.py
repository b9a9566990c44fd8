"""Models whose decoder layers are read when they are first fetched: the same as those that transformers loads."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.families import FAMILIES
from support.runs import refuse

from nnprune.experiment.build import build
from nnprune.experiment.preparation import open_engine, skeleton
from nnprune.model.checkpoint import Checkpoint
from nnprune.model.decoder import Decoder
from nnprune.model.loading import ModelSource
from nnprune.run import run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_read_in_parts_is_the_one_that_transformers_loads(family, dtype, tmp_path):
    FAMILIES[family]().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    decoder = Decoder(source.skeleton(source.config()))
    checkpoint, wanted = source.checkpoint(decoder.model), source.load(source.config())
    assert checkpoint.can_read()
    inside = [name for name in decoder.model.state_dict() if name.startswith(f"{decoder.path}.")]
    checkpoint.load_embeddings_and_head([name for name in decoder.model.state_dict() if name not in inside])
    found = {**decoder.model.state_dict(), **dict(decoder.model.named_buffers()), **checkpoint.read(inside)}
    for name, tensor in {**wanted.state_dict(), **dict(wanted.named_buffers())}.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found.pop(name), tensor), name
    assert not found


def resident(engine):
    return [not any(parameter.is_meta for parameter in layer.parameters()) for layer in engine.decoder.layers]


@pytest.mark.parametrize(
    ("layers", "dtype", "stays"), [("host", "float32", 1), ("device", "bfloat16", 1), ("host", "bfloat16", 0)]
)
def test_layers_are_read_when_they_are_first_fetched(layers, dtype, stays, tiny_config, monkeypatch):
    monkeypatch.setattr(ModelSource, "load", refuse)
    monkeypatch.setattr(ModelSource, "stored_dtype", getattr(torch, dtype))
    monkeypatch.setattr(ModelSource, "computing_dtype", lambda *_: torch.float32)
    experiment = build(tiny_config(f"runtime.layers={layers}"))
    engine = open_engine(experiment, skeleton(experiment, experiment.source.config()))
    assert resident(engine) == [False, False]
    reads, read = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, names: reads.append(names) or read(self, names))
    engine.store.fetch(0)
    engine.store.prefetch(1)
    engine.store.release(0)
    engine.store.fetch(1)
    assert resident(engine) == [bool(stays), True]
    assert len(reads) == 2, "the second was prefetched"
    engine.store.fetch(0)
    assert len(reads) == 3 - stays


def test_a_prefetch_for_which_there_was_no_memory_is_done_again(tiny_config, monkeypatch):
    experiment = build(tiny_config())
    store = open_engine(experiment, skeleton(experiment, experiment.source.config())).store
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", out_of_memory)
        store.prefetch(0)
        store._prefetched[1].exception()
    assert not any(parameter.is_meta for parameter in store.fetch(0).parameters())
    monkeypatch.setattr(Checkpoint, "read", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        store.fetch(1)


def out_of_memory(*_):
    raise torch.OutOfMemoryError


def test_a_checkpoint_that_cannot_be_read_in_parts_is_loaded_whole(tiny_config, tiny_model_dir, tmp_path, monkeypatch):
    expected = run(tiny_config(f"outputs={tmp_path / 'parts'}"))
    loaded, load = [], ModelSource.load
    monkeypatch.setattr(ModelSource, "load", lambda self, config: loaded.append(self) or load(self, config))
    source = ModelSource(str(tiny_model_dir))
    checkpoint = source.checkpoint(source.skeleton(source.config()))
    assert checkpoint.can_read()
    checkpoint.places.pop("model.decoder.layers.0.fc1.weight")
    assert not checkpoint.can_read()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "can_read", lambda *_: False)
        assert run(tiny_config(f"outputs={tmp_path / 'whole'}")).metrics == expected.metrics
    binary = shutil.copytree(tiny_model_dir, tmp_path / "binary")
    torch.save(load_file(binary / "model.safetensors"), binary / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    assert run(tiny_config(f"model.path={binary}")).metrics == expected.metrics
    assert len(loaded) == 2
