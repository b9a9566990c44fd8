"""Linears whose inputs cannot be seen are left alone, named and recorded; a model of nothing else is refused."""

import logging

import pytest
import torch
from conftest import byte_tokenizer
from support.engine import engine_of, prune, random_ids
from support.families import FAMILIES, HYBRIDS, make_model
from torch import nn
from torch.nn.functional import linear

from nnprune.engine.consistency_check import check_consistency
from nnprune.model.decoder import Decoder
from nnprune.model.left_alone import CALLED_OTHERWISE, NO_LINEAR, NOT_CALLED, SHARED
from nnprune.patterns import NM
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.run import run


class Fused(nn.Linear):
    """Used without its forward, as by a kernel that takes its weight."""

    def __call__(self, X):
        return linear(X, self.weight, self.bias)


class InPieces(nn.Linear):
    """Called for one half of the tokens after the other."""

    def __call__(self, X):
        return torch.cat([nn.Linear.__call__(self, part) for part in X.chunk(2, dim=1)], dim=1)


def replaced(kind, layers, num_layers=3):
    """A Llama whose down_proj in some layers is of another kind."""
    model = make_model("Llama", num_key_value_heads=2, num_hidden_layers=num_layers)()
    for index in layers:
        model.model.layers[index].mlp.down_proj.__class__ = kind
    return model


@pytest.mark.parametrize(
    ("kind", "layers", "depth", "expected"),
    [
        (Fused, (1,), 3, {"model.layers.1.mlp.down_proj": NOT_CALLED}),
        (Fused, range(3), 3, {"model.layers.*.mlp.down_proj": NOT_CALLED}),
        (Fused, range(12), 12, {"model.layers.*.mlp.down_proj": NOT_CALLED}),  # layers that are not checked, too
        (InPieces, range(3), 3, {"model.layers.*.mlp.down_proj": CALLED_OTHERWISE}),
    ],
)
def test_left_alone(kind, layers, depth, expected, tmp_path, caplog):
    model = replaced(kind, layers, depth)
    before = [layer.mlp.down_proj.weight.clone() for layer in model.model.layers]
    engine = engine_of(model, tmp_path)
    with caplog.at_level(logging.INFO):
        check_consistency(engine)
    assert engine.decoder.left_alone == expected
    [(name, reason)] = expected.items()
    assert caplog.messages == [f"left alone: {name} ({reason})"]
    if depth == 3:
        prune(engine, SparseGPT(), dict.fromkeys(engine.decoder.shapes(), NM(2, 4)), random_ids(rows=4))
        for index, layer in enumerate(model.model.layers):
            assert torch.equal(layer.mlp.down_proj.weight, before[index]) == (index in layers)
            NM(2, 4).check(layer.mlp.up_proj.weight)


def test_a_model_with_nothing_to_prune_is_refused(tmp_path):
    model = FAMILIES["llama"]()
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Fused
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no linear that can be pruned .*; choose another model$"):
        check_consistency(engine_of(model, tmp_path))


def test_weights_shared_by_layers_and_those_of_no_linear():
    decoder = Decoder(HYBRIDS["zamba"]())
    shared = {name for name, reason in decoder.left_alone.items() if reason == SHARED}
    assert "model.layers.*.shared_transf.self_attn.q_proj" in shared
    assert not any("shared_transf" in name for name in decoder.shapes())
    assert decoder.left_alone["model.layers.*.mamba_decoder.mamba.conv1d.weight"] == NO_LINEAR


def test_the_record_says_what_was_left_alone(tiny_config, tmp_path):
    HYBRIDS["mamba"]().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    record = run(tiny_config(f"model.path={tmp_path / 'model'}", "pruner=wanda", "sparsity=2:4"))
    assert record.linear_sparsity == 0.5
    assert not any("dt_proj" in linear["name"] for linear in record.per_linear)
    assert record.left_alone == {
        "backbone.layers.*.mixer.A_log": NO_LINEAR,
        "backbone.layers.*.mixer.conv1d.weight": NO_LINEAR,
        "backbone.layers.*.mixer.dt_proj": NOT_CALLED,
    }
