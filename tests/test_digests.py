"""What a local model is known by: all bytes of its files, hashed once."""

import json
import shutil

import pytest

from nnprune.files import digests
from nnprune.model.loading import ModelSource


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A model that a test may change."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def test_every_byte_of_a_model_counts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", -1)  # as if the files were older
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen = {ModelSource(str(folder)).digest()}
    weights = (folder / "model.safetensors").read_bytes()
    for place in range(len(weights) - 900, len(weights), 300):
        (folder / "model.safetensors").write_bytes(weights[:place] + bytes([weights[place] ^ 1]) + weights[place + 1 :])
        seen.add(ModelSource(str(folder)).digest())
    assert len(seen) == 4
    (folder / "model.safetensors").write_bytes(weights)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        seen.add(ModelSource(str(folder)).digest())
    assert len(seen) == 6
    before = ModelSource(str(folder)).digest()
    for name in ("README.md", "other.safetensors", "generation_config.json"):
        (folder / name).write_text("no part of the model")
    assert ModelSource(str(folder)).digest() == before
    assert ModelSource(str(shutil.copytree(folder, tmp_path / "copy"))).digest() == before


@pytest.mark.parametrize("damage", ["none", "cut", "list", "folder", "forgotten"])
def test_digests_are_cached(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(digests, "SETTLED", -1)
    monkeypatch.setattr(digests, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, cache = tmp_path / "file", tmp_path / "cache/nnprune/digests.json"
    path.write_bytes(b"abc")
    if damage == "folder":
        cache.mkdir(parents=True)
    first = digests.file_digest(path)
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    if damage in ("cut", "list"):
        cache.write_text("[1]" if damage == "list" else cache.read_text()[:20])
    if damage == "none":
        known = json.loads(cache.read_text())
        cache.write_text(json.dumps(dict.fromkeys(known, "0" * 64)))  # read back, and not computed
    monkeypatch.setattr(digests, "_known", {})
    assert digests.file_digest(path) == ("0" * 64 if damage == "none" else first)


def test_a_file_that_has_just_changed_is_hashed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").write_bytes(b"abc")
    digests.file_digest(tmp_path / "file")
    assert not (tmp_path / "cache").exists()
