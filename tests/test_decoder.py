"""Any dense decoder-only model, seen as shell, decoder layers and linears, with no list of architectures."""

import pytest
import torch
from support.engine import engine_of, prune, random_ids, through_layers
from support.families import FAMILIES, MIXTURES, make_model
from torch import nn

import nnprune.engine.hidden_states
from nnprune.engine.consistency_check import check_consistency
from nnprune.engine.input_groups import input_groups
from nnprune.model.decoder import Decoder, run_layer
from nnprune.patterns import parse_pattern
from nnprune.pruners.sparsegpt import SparseGPT


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layer_by_layer_is_exactly_the_model(family, tmp_path, monkeypatch):
    monkeypatch.setattr(nnprune.engine.hidden_states, "tokens_of_logits", lambda *a: 5)
    model, ids = FAMILIES[family](), random_ids()
    expected = model(ids).logits
    engine = engine_of(model, tmp_path)
    check_consistency(engine)
    with through_layers(engine, ids, pruned=False) as stream:
        logits = torch.full_like(expected, torch.nan)
        for row, tokens, some in stream.logits():
            logits[row, tokens] = some
    torch.testing.assert_close(logits, expected)  # the head sees few tokens at a time
    decoder = engine.decoder
    calls, hidden = decoder.record_calls(random_ids(seed=1)), decoder.embed(ids)
    for layer, call in zip(decoder.layers, calls, strict=True):
        hidden = run_layer(layer, hidden, call)
    assert torch.equal(decoder.logits(ids, hidden), expected)
    assert torch.equal(model(ids).logits, expected), "the model was changed by looking at it"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_configuration_that_asks_for_the_logits_of_routers(family, tmp_path):
    model = MIXTURES[family]()
    model.config.output_router_logits = True
    engine = engine_of(model, tmp_path)
    check_consistency(engine)
    ids = random_ids()
    assert engine.decoder.logits(ids, engine.decoder.embed(ids)).shape == (*ids.shape, model.config.vocab_size)


@pytest.mark.parametrize("spec", ["0.5", "2:4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_leaves_the_exact_pattern_and_nothing_else_changed(family, spec, tmp_path):
    model, pattern = FAMILIES[family](), parse_pattern(spec)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = engine_of(model, tmp_path)
    linears = {name: linear for index in range(3) for name, linear in engine.decoder.weights(index).items()}
    plan = dict.fromkeys(linears, pattern)
    reports = prune(engine, SparseGPT(), plan, random_ids(rows=8, seq_len=32))
    assert sorted(linear["name"] for report in reports for linear in report["linears"]) == sorted(linears)
    for linear in linears.values():
        weight = linear.read()
        pattern.check(weight)
        assert weight.count_nonzero() == weight.numel() // 2
    pruned_names = {f"{name}.weight" for name in linears}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in pruned_names), name
    assert model(random_ids()).logits.isfinite().all()


@pytest.mark.parametrize(("family", "linears"), [("opt", 6), ("llama", 7)])
def test_four_distinct_inputs_a_layer(family, linears):
    decoder, ids = Decoder(FAMILIES[family]()), random_ids()
    hidden, call = decoder.embed(ids), decoder.record_calls(ids)[1]
    groups = input_groups(decoder.weights(1), lambda: run_layer(decoder.layers[1], hidden, call))
    assert len(groups) == 4
    assert sum(map(len, groups)) == linears
    short = [{name.rsplit(".", 1)[1] for name in names} for names in groups]
    assert short[0] == {"q_proj", "k_proj", "v_proj"}
    assert family == "opt" or short[2] == {"gate_proj", "up_proj"}


def test_layers_of_gemma_get_their_own_arguments():
    decoder = Decoder(FAMILIES["gemma3"]())
    calls = decoder.record_calls(random_ids())
    masks = [call.kwargs["attention_mask"] for call in calls]
    rotary = [call.kwargs["position_embeddings"][0] for call in calls]
    assert not torch.equal(rotary[0], rotary[1])
    assert (masks[0] is None) != (masks[1] is None) or not torch.equal(masks[0], masks[1])


def test_conv1d_weights_are_seen_as_output_by_input():
    decoder = Decoder(FAMILIES["gpt2"]())
    assert decoder.shapes()["transformer.h.0.attn.c_attn"] == (96, 32)


def test_experts_in_one_matrix_are_refused():
    with pytest.raises(
        ValueError, match=r"DbrxForCausalLM holds the weights of all experts in the matrices of transformer\.blocks\.0"
    ):
        Decoder(MIXTURES["dbrx"]())


def test_layers_path():
    model = FAMILIES["llama"]()
    assert Decoder(model, "model.layers").path == "model.layers"
    with pytest.raises(ValueError, match=r"model\.layers_path=model\.nothing: LlamaForCausalLM has no list"):
        Decoder(model, "model.nothing")
    model.model.second = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(ValueError, match=r"found model\.layers, model\.second; set model\.layers_path"):
        Decoder(model)
    assert Decoder(model, "model.layers").weights(0)


def test_the_gate_refuses_a_model_that_its_layers_do_not_explain(tmp_path):
    model = FAMILIES["llama"]()

    class Secretive(type(model.model.layers[1])):
        calls = 0

        def forward(self, hidden_states, *args, **kwargs):
            Secretive.calls += 1  # something that no argument tells
            return super().forward(hidden_states, *args, **kwargs) * Secretive.calls

    model.model.layers[1].__class__ = Secretive
    with pytest.raises(ValueError, match="do not give the model's own logits"):
        check_consistency(engine_of(model, tmp_path))


@pytest.mark.parametrize(("depth", "checked"), [(8, range(8)), (12, (0, 6, 11))])
def test_of_a_deep_model_the_gate_looks_at_a_few_layers(depth, checked, tmp_path, monkeypatch):
    engine = engine_of(make_model("Llama", num_hidden_layers=depth)(), tmp_path)
    fetched, fetch = [], engine.store.fetch
    monkeypatch.setattr(engine.store, "fetch", lambda index, pruned: fetched.append(index) or fetch(index, pruned))
    check_consistency(engine)
    assert fetched == list(checked)


def test_the_gate_refuses_a_model_whose_tokens_see_later_ones(tmp_path):
    model = FAMILIES["llama"]()
    model.model.layers[0].mlp.forward = lambda hidden: hidden + hidden.mean(1, keepdim=True)
    with pytest.raises(ValueError, match="no causal language model"):
        check_consistency(engine_of(model, tmp_path))
