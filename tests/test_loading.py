"""Which files are the checkpoint, what is tied, and what is refused before anything long: as transformers does, layers on disk or not."""

import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, compose_config
from safetensors.torch import load_file, save_file
from support.runs import failure
from transformers import AutoModelForCausalLM, LlamaConfig

from nnprune.experiment.build import build
from nnprune.experiment.preparation import skeleton
from nnprune.model.loading import ModelSource

CONFIG = {"vocab_size": 264, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}


@pytest.fixture
def folder(tmp_path):
    """A random Llama, whose folder a test may damage."""
    return make(tmp_path / "model")


def make(folder, **options):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**{**CONFIG, **options})).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def edit(folder, change):
    """Change the weights of a checkpoint of one file in place."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def shard(folder):
    """Split a checkpoint in two files and an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-{1 + index % 2:05d}-of-00002.safetensors" for index, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: state[key] for key in state if names[key] == name}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def on_disk(source):
    """The whole state that is read with layers on disk."""
    model = source.skeleton(source.config())
    checkpoint = source.checkpoint(model)
    inside = [name for name in model.state_dict() if ".layers." in name]
    checkpoint.load_embeddings_and_head([name for name in model.state_dict() if name not in inside])
    return {**model.state_dict(), **checkpoint.read(inside)}


def assert_as_transformers(folder, **options):
    """In memory and on disk: the names, dtypes and values of plain transformers."""
    source = ModelSource(str(folder), **options)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=source.stored_dtype).state_dict()
    for found in (source.load(source.config()).state_dict(), on_disk(source)):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name


def test_other_files_beside_the_checkpoint(folder):
    zeros = {key: torch.zeros_like(tensor) for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(zeros, folder / "model_ema.safetensors", metadata={"format": "pt"})
    assert_as_transformers(folder)
    shard(folder)
    save_file(zeros, folder / "model-00001-of-00003.safetensors", metadata={"format": "pt"})
    assert_as_transformers(folder)
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})  # before the index
    assert_as_transformers(folder)


def test_a_named_weight_file(folder):
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    configure(folder, transformers_weights="mine.safetensors")
    assert_as_transformers(folder)


@pytest.mark.parametrize("stored", ["embeddings", "head", "both alike", "both"])
def test_tied_heads(tmp_path, stored):
    folder = make(tmp_path / "model", tie_word_embeddings=True)

    def change(state):
        embeddings = state.pop("model.embed_tokens.weight")
        if stored != "head":
            state["model.embed_tokens.weight"] = embeddings
        if stored != "embeddings":
            state["lm_head.weight"] = embeddings + (stored == "both")

    edit(folder, change)
    assert_as_transformers(folder)
    source = ModelSource(str(folder))
    model = source.skeleton(source.config())
    source.checkpoint(model).load_embeddings_and_head([name for name in model.state_dict() if ".layers." not in name])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (stored != "both")
    assert source.checkpoint(source.skeleton(source.config())).can_read()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_dtypes(folder, dtype):
    edit(folder, lambda state: state.update({key: tensor.double() for key, tensor in state.items() if "mlp" in key}))
    assert_as_transformers(folder, dtype=dtype)


def test_a_missing_shard_and_a_damaged_index(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert refusal(folder) == f"model.path={folder}: model.safetensors.index.json names model-00002-of-00002.safetensors, " + (
        "which is missing; get the checkpoint again"
    )
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 1}')
    assert "model.safetensors.index.json says of no weights where they are" in refusal(folder)


def refusal(folder, **options):
    """What a plan and a run are refused with, before weights are read."""
    source = ModelSource(str(folder), **options)
    with pytest.raises(ValueError, match=r"^model\.path=") as caught:
        source.skeleton(source.config())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors", "mxfp4"])
def test_quantised_configurations(folder, method):
    configure(folder, quantization_config={"quant_method": method, "bits": 4})
    assert f"quantization_config in config.json says {method}: the checkpoint is quantised" in refusal(folder)


PROJECTION = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("kind", ["int8", "uint8", "float8", "packed"])
def test_quantised_weights(folder, kind):
    def change(state):
        weight = state.pop(f"{PROJECTION}.weight")
        if kind == "packed":
            state[f"{PROJECTION}.qweight"] = torch.zeros(4, 32, dtype=torch.int32)
        else:
            state[f"{PROJECTION}.weight"] = weight.to(getattr(torch, kind, torch.float8_e4m3fn))

    edit(folder, change)
    message = refusal(folder)
    assert PROJECTION in message
    assert "the checkpoint is quantised, and only dense weights can be pruned" in message


def test_weights_of_other_shapes_and_too_few(folder):
    configure(folder, intermediate_size=48)
    assert "mlp.down_proj.weight is (16, 32) in model.safetensors, and config.json asks for (16, 48)" in refusal(folder)
    configure(folder, intermediate_size=32, num_hidden_layers=3)
    assert "the checkpoint lacks model.layers.2." in refusal(folder)


def test_weights_of_torch(folder, tiny_config):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    source = ModelSource(str(folder))
    wanted = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in source.load(source.config()).state_dict().items())
    with pytest.raises(ValueError, match=r"^runtime\.layers=disk: .*pytorch_model\.bin.*use runtime\.layers=host"):
        source.check(source.skeleton(source.config()), "disk")
    assert failure(tiny_config(f"model.path={folder}", "runtime.layers=disk")).startswith("runtime.layers=disk: ")
    configure(folder, hidden_size=32)
    assert "config.json asks for" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    assert "pytorch_model.bin cannot be read" in refusal(folder)


def test_a_tokenizer_of_another_model(folder):
    configure(folder, vocab_size=200)
    with pytest.raises(
        ValueError, match=r"^model\.path=.*: its tokenizer gives ids up to 258, and config\.json says vocab_size=200"
    ):
        ModelSource(str(folder)).tokenizer()
    configure(folder, vocab_size=259)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unused>"]})  # beyond the embeddings, but in no text
    tokenizer.save_pretrained(folder)
    assert ModelSource(str(folder)).tokenizer()("a").input_ids == byte_tokenizer()("a").input_ids


DAMAGED = [
    *("{", "[]", "\xff", '{"model_type": 5}', '{"model_type": "unheard_of"}'),
    '{"model_type": "llama", "hidden_size": "many"}',
    '{"model_type": "llama", "num_attention_heads": 0}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_configurations(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    assert "cannot be loaded" in refusal(folder)


def test_the_whole_reason_is_told(folder):
    configure(folder, num_attention_heads=3)
    assert "The hidden size (16) is not a multiple of the number of attention heads (3)" in refusal(folder)


def test_code_of_a_model_runs_only_when_told_to(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'unheard_of'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    (folder / "custom.py").write_text(code)
    auto_map = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    configure(folder, model_type="unheard_of", architectures=["Model"], auto_map=auto_map)
    assert "set model.trust_remote_code=true" in refusal(folder)
    source = ModelSource(str(folder), trust_remote_code=True)
    assert type(source.load(source.config())).__name__ == "Model"
    with pytest.raises(ValueError, match=r"^model\.trust_remote_code=yes: must be true or false"):
        ModelSource(str(folder), trust_remote_code="yes")
    cfg = compose_config("model=local", f"model.path={folder}", "model.trust_remote_code=true")
    assert cfg.model.trust_remote_code is True


def test_a_plan_is_refused_too(folder, tiny_config):
    """What a plan and a run begin with."""
    configure(folder, intermediate_size=48)
    experiment = build(tiny_config(f"model.path={folder}"))
    with pytest.raises(ValueError, match=r"config\.json asks for"):
        skeleton(experiment, experiment.source.config())


def test_a_folder_without_a_tokenizer_is_refused(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "bare")
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"model\.path=.*(has no tokenizer|cannot be loaded)"):
        ModelSource(str(folder)).tokenizer()


def test_a_revision_of_a_folder_is_refused(tiny_model_dir):
    with pytest.raises(ValueError, match=r"model\.revision=5: .* is a local directory; leave model\.revision out"):
        ModelSource(str(tiny_model_dir), revision=5)
