"""Weights that transformers makes of several tensors of a checkpoint: read as it makes them, and taken apart again."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import HYBRIDS, MIXTURES

from nnprune.model.checkpoint import Checkpoint
from nnprune.model.loading import ModelSource

IN_PARTS = {name: MIXTURES[name] for name in ("mixtral", "qwen2_moe", "deepseek_v3", "phimoe", "ernie4_5_moe", "lfm2_moe")}
IN_PARTS |= {name: HYBRIDS[name] for name in ("kimi_linear", "bailing_hybrid")}


@pytest.fixture
def source(tmp_path, request):
    """A checkpoint with values of their own in every tensor."""
    model = IN_PARTS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "model")
    return ModelSource(str(tmp_path / "model"))


def checkpoint_of(source):
    return Checkpoint(source.files.weights(), source.skeleton(source.config()), source.label)


@pytest.mark.parametrize("source", IN_PARTS, indirect=True)
def test_read_and_taken_apart(source):
    checkpoint, expected = checkpoint_of(source), source.load(source.config()).state_dict()
    assert checkpoint.conversions
    assert checkpoint.can_read()
    found = checkpoint.read(list(expected))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    stored = load_file(source.files.weights()[0])
    for conversion in checkpoint.conversions.values():
        assert conversion.can_revert()
        tensors = conversion.revert({name: expected[name] for name in conversion.shapes})
        assert tensors.keys() == conversion.patterns.keys()
        assert all(torch.equal(tensors[key], stored[key]) for key in tensors)
        assert {name for key in tensors for name in checkpoint.weights_of(key)} == set(conversion.shapes)


@pytest.mark.parametrize("source", ["mixtral"], indirect=True)
def test_parts_that_do_not_fit(source):
    [path] = source.files.weights()
    stored = load_file(path)
    key = next(key for key in stored if ".experts.1.w1" in key)
    save_file({name: tensor for name, tensor in stored.items() if name != key}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.layers\.\d\.mlp\.experts\.gate_up_proj; is it complete"):
        checkpoint_of(source)
    save_file({name: tensor for name, tensor in stored.items() if ".experts.1." not in name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"and others make .* of \(3, .*, and config\.json asks for \(4, "):
        checkpoint_of(source)
