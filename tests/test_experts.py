"""Mixtures of experts: what each expert receives, how it is pruned, and what is done for those that few tokens reach."""

import copy
import math
import re
from functools import partial

import pytest
import torch
import transformers
from conftest import compose_config
from support.engine import Witness, engine_of, random_ids
from support.experts import plain_inputs
from support.families import MIXTURES
from support.memory import peak_bytes

from nnprune.engine.experts import Routing, pool_key
from nnprune.engine.importance_pass import collect_inputs
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.memory import Workload, groups_of
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.experiment.build import build
from nnprune.method import Method
from nnprune.model.decoder import Decoder
from nnprune.patterns import NM, Unstructured
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.pruners.wanda import Wanda
from nnprune.statistics import Hessian

FAMILIES = [name for name in MIXTURES if name != "dbrx"]
IDS = random_ids(rows=6, seq_len=16)
CELLS = [(kind, pattern) for kind in (Wanda, SparseGPT) for pattern in (Unstructured(0.5), NM(2, 4))]


def prune_cells(name, folder, cells):
    """Layer files of each cell, pruned in one pass over the dense model, and a dense copy of it."""
    engine = engine_of(MIXTURES[name](), folder)
    engine.routing = Routing(min_tokens=1)
    shapes = engine.decoder.shapes()
    tasks = [
        PruneTask(Method(kind()), dict.fromkeys(shapes, pattern), LayerFiles(folder / str(index), engine.decoder.path))
        for index, (kind, pattern) in enumerate(cells)
    ]
    PruningPass(engine, tasks, "dense").run(IDS)
    return [task.layer_files for task in tasks], Decoder(MIXTURES[name]())


@pytest.mark.parametrize("name", FAMILIES)
def test_an_expert_is_pruned_as_by_a_plain_loop_over_its_own_tokens(name, tmp_path):
    files, dense = prune_cells(name, tmp_path, CELLS)
    inputs = plain_inputs(dense, IDS)
    assert any(view.expert for index in range(len(dense.layers)) for view in dense.weights(index).values())
    for (kind, pattern), layers in zip(CELLS, files, strict=True):
        for index in range(len(dense.layers)):
            state = layers.read(index)
            for linear, view in dense.weights(index).items():
                pruned = view.within(state[view.key.removeprefix(f"{dense.path}.{index}.")])
                pattern.check(pruned)
                X = inputs[linear]
                if not len(X):  # the mean of all experts' tokens stands for one of its own
                    siblings = [
                        other
                        for other, one in dense.weights(index).items()
                        if one.expert and pool_key(one.expert) == pool_key(view.expert)
                    ]
                    X = torch.cat([inputs[other] for other in siblings])
                pruner, statistic = kind(), kind.statistic()
                statistic.add(X)
                pruner.statistics[linear] = statistic
                expected = pruner.prune_linear(view.read(), linear, pattern)
                torch.testing.assert_close(pruned, expected, rtol=1e-3, atol=1e-5)


def test_every_linear_of_a_mixture_but_its_routers_is_pruned():
    for name in FAMILIES:
        decoder = Decoder(MIXTURES[name]())
        keys = {view.key for index in range(len(decoder.layers)) for view in decoder.weights(index).values()}
        left = {key for key, one in decoder.layers.named_parameters(prefix=decoder.path) if one.ndim > 1} - keys
        assert left and all(re.search(r"gate\.|router|bias|conv|expert_gate", key) for key in left), (name, left)


def statistic_of(X):
    statistic = Hessian()
    statistic.add(X)
    return statistic


def reports_of(name, folder, routing, method=None, propagate="pruned", **runtime):
    """Linear -> its report, pruned with SparseGPT or another method."""
    engine = engine_of(MIXTURES[name](), folder, **runtime)
    engine.routing = routing
    method = method or Method(SparseGPT())
    task = PruneTask(method, dict.fromkeys(engine.decoder.shapes(), NM(2, 4)), engine.store.layer_files)
    PruningPass(engine, [task], propagate).run(IDS)
    files = task.layer_files
    return {one["name"]: one for index in range(engine.num_layers) for one in files.reports[index]["linears"]}


def test_a_starved_expert_is_filled_up_with_the_mean_of_all_experts(tmp_path):
    inputs = plain_inputs(Decoder(MIXTURES["mixtral"]()), IDS)
    enough = sorted(len(inputs[f"model.layers.0.mlp.experts.{index}.down_proj"]) for index in range(4))[2]
    method = Method(Witness())
    reports = reports_of("mixtral", tmp_path, Routing(min_tokens=enough), method)
    for part in ("gate_up_proj", "down_proj"):
        names = [f"model.layers.0.mlp.experts.{index}.{part}" for index in range(4)]
        pool = statistic_of(torch.cat([inputs[name] for name in names])).mean()
        starved = [name for name in names if len(inputs[name]) < enough]
        assert 0 < len(starved) < 4
        for name in names:
            count = len(inputs[name])
            assert reports[name]["tokens"] == count
            assert reports[name].get("pooled_tokens", 0) == max(enough - count, 0)
            own = statistic_of(inputs[name]).mean()
            expected = own if count >= enough else (count * own + (enough - count) * pool) / enough
            torch.testing.assert_close(method.pruner.seen[name], expected, rtol=1e-4, atol=1e-6)


def test_all_tokens_can_be_shown_to_every_expert(tmp_path):
    model = MIXTURES["qwen2_moe"]()
    experts = model.model.layers[0].mlp.experts
    hidden = []
    experts.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    model(IDS)
    method = Method(Witness())
    reports = reports_of("qwen2_moe", tmp_path, Routing(1, shows_all=True), method)
    for index in range(4):
        name = f"model.layers.0.mlp.experts.{index}"
        assert reports[f"{name}.gate_up_proj"]["tokens"] == IDS.numel()
        inner = experts._apply_gate(hidden[0] @ experts.gate_up_proj[index].t())
        for part, X in (("gate_up_proj", hidden[0]), ("down_proj", inner)):
            torch.testing.assert_close(method.pruner.seen[f"{name}.{part}"], statistic_of(X).mean(), rtol=1e-4, atol=1e-6)


def test_experts_that_choose_their_tokens_themselves_cannot_be_shown_all(tmp_path):
    with pytest.raises(ValueError, match=r"calibration\.route=all: .*input_linear\.0 is of .*; set calibration\.route=own"):
        reports_of("jetmoe", tmp_path, Routing(shows_all=True))


@pytest.mark.parametrize("propagate", ["pruned", "dense", "sequential"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_several_passes_prune_as_one(name, propagate, tmp_path):
    found = []
    for folder, room in (("one", math.inf), ("several", 4 * 64**2)):
        engine = engine_of(MIXTURES[name](), tmp_path / folder)
        engine.routing, engine.runtime.statistics_bytes = Routing(min_tokens=60), room
        task = PruneTask(Method(SparseGPT()), dict.fromkeys(engine.decoder.shapes(), NM(2, 4)), engine.store.layer_files)
        PruningPass(engine, [task], propagate).run(IDS)
        found.append([task.layer_files.read(index) for index in range(engine.num_layers)])
    for one, several in zip(*found, strict=True):
        for key, tensor in one.items():
            torch.testing.assert_close(several[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["deepseek_v3", "jetmoe"])
@pytest.mark.parametrize(
    "preset", [["target=asymmetric"], ["pruner=best", "recover.epochs_after=1"], ["propagate=sequential", "update=refit"]]
)
def test_whole_methods_prune_mixtures(name, preset, tmp_path):
    config = compose_config("pruner=sparsegpt", *preset)
    reports = reports_of(name, tmp_path, Routing(), build(config).method, config.propagate)
    assert all(report["sparsity"] == 0.5 for report in reports.values())


def test_the_statistics_of_64_experts_stay_within_the_estimate(tmp_path):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 128,
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    config = transformers.Qwen3MoeConfig(vocab_size=264, num_hidden_layers=1, num_experts=64, num_experts_per_tok=4, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = random_ids(rows=16, seq_len=64)
    peaks = []
    for room in (math.inf, 1 << 19):
        engine = engine_of(copy.deepcopy(model), tmp_path / str(room), batch_tokens=256)
        method, weights = Method(SparseGPT()), engine.decoder.weights(0)
        experts = {name: pool_key(view.expert) for name, view in weights.items() if view.expert}
        shapes = {name: view.shape for name, view in weights.items()}
        engine.runtime.statistics_bytes = room
        load = Workload(shapes, groups_of(engine), [method], False, 4, 64, 64, 264, ids.numel(), 0, experts)
        estimated = sum(load.hidden_bytes()) + load.workspace_bytes(engine.runtime)
        task = PruneTask(method, dict.fromkeys(shapes, NM(2, 4)), engine.store.layer_files)
        measured = peak_bytes(partial(PruningPass(engine, [task], "pruned").run, ids))
        assert 0.3 * estimated <= measured <= estimated
        peaks.append(measured)
    assert peaks[1] < 0.7 * peaks[0]
    assert any("pooled_tokens" in linear for linear in task.layer_files.reports[0]["linears"])


def test_what_is_sampled_of_an_expert_does_not_depend_on_batches(tmp_path):
    ids = random_ids(rows=40, seq_len=16)
    found = []
    for tokens in (32, 1024):
        engine = engine_of(MIXTURES["mixtral"](), tmp_path / str(tokens), batch_tokens=tokens)
        with engine.hidden_states(ids, "test") as states:
            collector = collect_inputs(states, 0, engine.store.fetch(0), [Hessian], is_last=True)
        found.append({names[0]: statistic_of(collector.sample(names)).mean() for names in collector.groups})
    for name, one in found[0].items():
        torch.testing.assert_close(found[1][name], one, rtol=1e-4, atol=1e-6)


def test_a_single_expert_can_be_chosen(tmp_path):
    for index in range(4):
        engine = engine_of(MIXTURES["mixtral"](), tmp_path / str(index))
        chosen = {name for name in engine.decoder.shapes() if f".experts.{index}." in name}
        engine.decoder.keep(chosen)
        task = PruneTask(Method(SparseGPT()), dict.fromkeys(chosen, NM(2, 4)), engine.store.layer_files)
        PruningPass(engine, [task], "pruned").run(IDS)
        reports = [linear for layer in task.layer_files.reports.values() for linear in layer["linears"]]
        assert {linear["name"] for linear in reports} == chosen
        counts = task.layer_files.reports[0]
        assert counts["size"] == sum(parameter.numel() for parameter in engine.decoder.layers[0].parameters())
        assert counts["linear_zeros"] == counts["linear_size"] // 2 <= counts["zeros"] < counts["linear_size"]


def test_the_error_of_an_expert_that_no_token_reaches_does_not_depend_on_passes(tmp_path):
    ids, errors = torch.full((2, 16), 7), []
    for room in (math.inf, 1):  # all groups in one pass, and each in a pass of its own
        engine = engine_of(MIXTURES["mixtral"](), tmp_path / str(room))
        engine.runtime.statistics_bytes = room
        task = PruneTask(Method(SparseGPT()), dict.fromkeys(engine.decoder.shapes(), NM(2, 4)), engine.store.layer_files)
        PruningPass(engine, [task], "pruned").run(ids)
        linears = [one for index in range(engine.num_layers) for one in task.layer_files.reports[index]["linears"]]
        assert any(one.get("tokens") == 0 for one in linears)
        errors.append({one["name"]: one["relative_error"] for one in linears})
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
