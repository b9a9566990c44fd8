"""A saved model is its base checkpoint, name by name and bit by bit, but for the pruned weights."""

import errno
import json
import shutil

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.families import COMMON, FAMILIES, GROUPED, SLIDING
from support.runs import refuse
from support.saved import make_base, prune_and_save
from transformers import AutoModelForCausalLM

from nnprune import check
from nnprune.engine.pruning_pass import PruneTask
from nnprune.model import export
from nnprune.model.checkpoint import Checkpoint
from nnprune.model.conversions import Conversion
from nnprune.model.loading import ModelSource
from nnprune.run import run

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3_with_vision():
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config={**COMMON, **GROUPED, **SLIDING}, vision_config=VISION, mm_tokens_per_image=4
    )
    return AutoModelForCausalLM.from_config(config).eval()


def weights(folder):
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def assert_saved_as_base(base, saved, before, num_changed):
    """`before`: the tensors of the base checkpoint by their names on disk."""
    after = weights(saved)
    assert after.keys() == before.keys()
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert len(changed) == num_changed
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert key not in changed or torch.equal(after[key], tensor * (after[key] != 0)), key
    for path in base.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            assert (saved / path.name).read_bytes() == path.read_bytes(), path.name


def assert_loads(saved, state):
    """In plain transformers, as it was in memory."""
    loaded, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_with_vision"])
def test_names_and_bits(family, tmp_path, capsys):
    model = FAMILIES[family]() if family in FAMILIES else gemma3_with_vision()
    base = make_base(model, tmp_path / "base")
    saved, state = prune_and_save(base, tmp_path)
    num_linears = len(json.loads((saved / "pruning.json").read_text())["per_linear"])
    assert_saved_as_base(base, saved, weights(base), num_linears)
    assert_loads(saved, state)
    assert check.main([str(saved)]) == 0, capsys.readouterr().out


@pytest.fixture
def llama(tmp_path):
    return make_base(FAMILIES["llama"](), tmp_path / "base")


def test_what_the_model_never_loads(llama, tmp_path):
    """Tensors of other parts of a checkpoint, of dtypes and sizes that must not move others out of alignment."""
    before = weights(llama) | {
        "vision_tower.mask": torch.tensor([True, False, True]),
        "vision_tower.count": torch.tensor(7),
        "vision_tower.none": torch.empty(0, 4),
        "vision_tower.weight": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "vision_tower.norm": torch.tensor([1.0, -0.0], dtype=torch.float64),
    }
    save_file(before, llama / "model.safetensors", {"format": "pt"})
    saved, _ = prune_and_save(llama, tmp_path)
    as_bits = {key: tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor for key, tensor in before.items()}
    assert {key: tensor.dtype for key, tensor in weights(saved).items()} == {key: one.dtype for key, one in before.items()}
    for key, tensor in weights(saved).items():
        if key.startswith("vision_tower"):
            assert torch.equal(tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor, as_bits[key])


def test_several_shards(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 40_000)
    before = weights(llama)
    saved, state = prune_and_save(llama, tmp_path)
    files = sorted(saved.glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    for path in files:
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 40_000
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {key for key, name in index["weight_map"].items() if name == path.name}
    assert_saved_as_base(llama, saved, before, 21)
    assert_loads(saved, state)
    assert check.main([str(saved)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("stored", ["embeddings", "head", "both"])
def test_tied_heads(stored, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**COMMON, tie_word_embeddings=True))
    base = make_base(model, tmp_path / "base")
    before = weights(base)
    embeddings = before.pop("model.embed_tokens.weight")
    before |= {} if stored == "head" else {"model.embed_tokens.weight": embeddings}
    before |= {} if stored == "embeddings" else {"lm_head.weight": embeddings + (stored == "both")}
    save_file(before, base / "model.safetensors", {"format": "pt"})
    saved, state = prune_and_save(base, tmp_path)
    assert_saved_as_base(base, saved, before, 21)
    assert_loads(saved, state)


def test_weights_of_torch_are_saved_as_safetensors(llama, tmp_path, capsys):
    before = weights(llama)
    (llama / "model.safetensors").unlink()
    before["model.embed_tokens.weight"] = before["model.embed_tokens.weight"].t().contiguous().t()
    torch.save(before | {"epoch": 3}, llama / "pytorch_model.bin")
    saved, state = prune_and_save(llama, tmp_path)
    assert not (saved / "pytorch_model.bin").exists()
    assert_saved_as_base(llama, saved, before, 21)
    assert_loads(saved, state)
    assert check.main([str(saved)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_dtypes(dtype, llama, tmp_path):
    """A run in float32 is saved in float32, and a checkpoint of mixed dtypes stays mixed."""
    before = {key: tensor if "norm" in key else tensor.bfloat16() for key, tensor in weights(llama).items()}
    save_file(before, llama / "model.safetensors", {"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "transformers_weights": "model.safetensors"}))
    saved, state = prune_and_save(llama, tmp_path, dtype=dtype)
    found = json.loads((saved / "config.json").read_text())
    assert found == {**config, "dtype": "bfloat16" if dtype == "auto" else "float32"}
    pruned = torch.bfloat16 if dtype == "auto" else torch.float32
    for key, tensor in weights(saved).items():
        assert tensor.dtype == (pruned if "_proj" in key else before[key].dtype), key
    assert_loads(saved, state)


def test_a_configuration_that_names_no_dtype_means_that_of_the_weights(llama, tmp_path):
    save_file({key: tensor.bfloat16() for key, tensor in weights(llama).items()}, llama / "model.safetensors", {"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    del config["dtype"]
    (llama / "config.json").write_text(json.dumps(config))
    source = ModelSource(str(llama))
    assert source.stored_dtype == torch.bfloat16 == AutoModelForCausalLM.from_pretrained(llama).dtype
    saved, state = prune_and_save(llama, tmp_path)
    assert json.loads((saved / "config.json").read_text()) == {**config, "dtype": "bfloat16"}
    assert {tensor.dtype for tensor in weights(saved).values()} == {torch.bfloat16}
    assert_loads(saved, state)


def test_a_named_weight_file(llama, tmp_path):
    (llama / "model.safetensors").rename(llama / "mine.safetensors")
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "transformers_weights": "mine.safetensors"}))
    saved, state = prune_and_save(llama, tmp_path)
    assert json.loads((saved / "config.json").read_text()) == config
    assert_loads(saved, state)


def test_the_card(llama, tmp_path):
    saved, _ = prune_and_save(llama, tmp_path)
    _, front, text = (saved / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "transformers"
    assert front["datasets"] == ["allenai/c4"]
    assert "base_model" not in front, "a local folder is no model of the hub"
    for fact in ("pruned to 2:4", "nnprune-check DIR", "nothing is faster", "nnprune.pruners.magnitude.Magnitude"):
        assert fact in text


def test_a_full_disk(llama, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match=r"save=true: .* \(No space left on device\); make room or set outputs"):
        prune_and_save(llama, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "layers"]


def test_what_cannot_be_saved_is_refused_before_pruning(tiny_config, monkeypatch):
    name = "model.decoder.layers.1.fc1.weight"
    known = Checkpoint.__init__

    def with_one_in_parts(self, *args):  # as if transformers made this weight of others
        known(self, *args)
        header = self.places.pop(name)
        self.conversions[name] = Conversion(self, None, name, str, {header.key: ""}, {header.key: header.shape})

    monkeypatch.setattr(Checkpoint, "__init__", with_one_in_parts)
    monkeypatch.setattr(Conversion, "apply", lambda self, tensors: {self.name: next(iter(tensors.values()))})
    monkeypatch.setattr(Conversion, "can_revert", lambda _: False)
    monkeypatch.setattr(PruneTask, "__init__", refuse)
    with pytest.raises(
        ValueError, match=r"save=true: transformers computes model\.decoder\.layers\.1\.fc1\.weight from other tensors"
    ):
        run(tiny_config("pruner=wanda", "save=true"))
