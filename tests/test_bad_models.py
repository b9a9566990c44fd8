"""Models that cannot be pruned, or that are damaged: each is one line that names the model or the linear, and a record."""

import shutil

import pytest
import torch
import transformers
from conftest import byte_tokenizer, save_random
from support.families import COMMON, HYBRIDS, MIXTURES
from support.runs import failure
from transformers import AutoModelForCausalLM, Gemma3nTextConfig


def model_dir(folder, config, architecture=None):
    """A directory with configuration and tokenizer, and no weights."""
    config.architectures = [architecture] if architecture else None
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


TINY = {"vocab_size": 264, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
BERT = transformers.BertConfig(**TINY)
T5 = transformers.T5Config(vocab_size=264, d_model=16, num_heads=2, num_layers=2, d_ff=32)
DBRX = MIXTURES["dbrx"]().config
NO_DECODERS = [
    (BERT, "BertForMaskedLM", "BertForMaskedLM is no causal language model"),
    (T5, "T5ForConditionalGeneration", "T5ForConditionalGeneration is no causal language model"),
    (T5, None, "t5 is no causal language model"),
    (transformers.ViTConfig(hidden_size=16), None, "vit is no causal language model"),
    (DBRX, "DbrxForCausalLM", "holds the weights of all experts in the matrices"),
]


@pytest.mark.parametrize(("config", "architecture", "reason"), NO_DECODERS, ids=["bert", "t5", "t5-nameless", "vit", "dbrx"])
def test_models_that_cannot_be_pruned(tiny_config, tmp_path, config, architecture, reason):
    folder = model_dir(tmp_path / "model", config, architecture)
    if architecture == "DbrxForCausalLM":
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    message = failure(tiny_config(f"model.path={folder}"))
    assert reason in message
    assert "choose a " in message


@pytest.mark.parametrize("recover", ["layer", "model"])
def test_layers_that_share_weights_are_not_tuned(recover, tiny_config, tmp_path):
    model = HYBRIDS["zamba"]()
    model.save_pretrained(tmp_path / "model")
    folder = model_dir(tmp_path / "model", model.config, "ZambaForCausalLM")
    message = failure(tiny_config(f"model.path={folder}", f"recover={recover}"))
    assert (
        message
        == "recover: model has weights that several decoder layers share, which tuning would change for some; set recover=none"
    )


def test_a_bert_that_does_not_say_what_it_is(tiny_config, tmp_path):
    AutoModelForCausalLM.from_config(BERT).save_pretrained(tmp_path / "model")
    folder = model_dir(tmp_path / "model", BERT)
    assert "is no causal language model; choose another model.path" in failure(tiny_config(f"model.path={folder}"))


INCOMPLETE = [
    ("config.json", None, "has no config.json"),
    ("config.json", "{}", "cannot be loaded"),
    ("config.json", "{", "cannot be loaded"),
    ("tokenizer.json", None, "cannot be loaded"),
    ("tokenizer.json", "{", "cannot be loaded"),
]


@pytest.mark.parametrize(("file", "content", "reason"), INCOMPLETE)
def test_incomplete_model_directories(tiny_config, tiny_model_dir, tmp_path, file, content, reason):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    message = failure(tiny_config(f"model.path={folder}"))
    assert message.startswith(f"model.path={folder}: ")
    assert reason in message


@pytest.mark.parametrize("damage", ["gone", "cut"])
@pytest.mark.parametrize("layers", ["host", "disk"])
def test_weights_that_are_gone_or_cut(tiny_config, tiny_model_dir, tmp_path, damage, layers):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    if damage == "cut":
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert failure(tiny_config(f"model.path={folder}", f"runtime.layers={layers}")).startswith(f"model.path={folder}: ")


def damaged_model(source, folder, parameter):
    """A copy of the model in `source` with one NaN."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[5] = torch.nan
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("text", ["evaluation=text", "evaluation=none"])
@pytest.mark.parametrize("linear", ["model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.1.fc2"])
def test_a_nan_weight_is_named(tiny_config, tiny_model_dir, tmp_path, linear, text):
    folder = damaged_model(tiny_model_dir, tmp_path / "model", f"{linear}.weight")
    cfg = tiny_config(f"model.path={folder}", "pruner=wanda")
    if text == "evaluation=none":
        cfg.evaluation = {**cfg.evaluation, "path": None}
    message = failure(cfg)
    assert message.startswith(f"{linear}: its weight holds NaN")
    assert "checkpoint" in message


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
def test_nan_activations_are_named(tiny_config, tiny_model_dir, tmp_path, pruner):
    folder = damaged_model(tiny_model_dir, tmp_path / "model", "model.decoder.layers.1.final_layer_norm.weight")
    message = failure(tiny_config(f"model.path={folder}", f"pruner={pruner}"))
    assert message.startswith("model.decoder.layers.1.fc1: its inputs hold NaN")
    assert "model.dtype" in message


def test_a_model_of_other_hidden_states_is_refused(tiny_config, tmp_path):
    config = Gemma3nTextConfig(
        **{**COMMON, "intermediate_size": [64] * 3, "head_dim": 8, "sliding_window": 8, "num_key_value_heads": 2},
        **{"layer_types": ["full_attention"] * 3, "num_kv_shared_layers": 1, "activation_sparsity_pattern": [0.0] * 3},
        **{"vocab_size_per_layer_input": 264, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "laurel_rank": 4},
    )
    folder = save_random(config, tmp_path / "gemma3n")
    message = failure(tiny_config(f"model.path={folder}", "pruner=wanda"))
    assert message.startswith("model.path: Gemma3nForCausalLM gives its decoder layers hidden states (2, 2, 16, 32) instead of")


def test_a_folder_that_is_no_model_is_told_before_the_texts(tiny_config, tmp_path):
    message = failure(tiny_config(f"model.path={tmp_path}", "evaluation.path=nowhere.txt"))
    assert message.startswith(f"model.path={tmp_path}: has no config.json; give a directory made by save_pretrained")
