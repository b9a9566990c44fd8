"""Windows of decoder layers that are tuned together."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from support.engine import IDS, engine_of, prune, prune_model, random_ids, recover, through_layers
from support.families import FAMILIES, larger
from support.runs import failure
from torch.nn.functional import kl_div

from nnprune.engine import logits
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.method import Method
from nnprune.patterns import NM
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.run import run


def windows(num_layers):
    return Method(SparseGPT(), recovery=recover(0, 3, num_layers=num_layers, lr=3e-3, logits_epochs=3))


@pytest.mark.parametrize("propagate", ["pruned", "dense", "sequential"])
def test_layers_are_tuned_together_with_those_before_them(tmp_path, propagate):
    """Each window begins with the layers as the window before left them, and its report has its own losses."""
    seen, weights = [], []
    method = windows(2)
    tune = method.recovery.tune

    def witness(index, layers, run, inputs, targets, *more):
        with torch.no_grad():
            rows = list(range(len(IDS)))
            before = inputs.pick(rows).clone(), run(layers, inputs.pick(rows)).clone(), targets.pick(rows).clone()
        began = copy.deepcopy(layers).state_dict()
        report = tune(index, layers, run, inputs, targets, *more)
        weights.append((began, copy.deepcopy(layers).state_dict()))
        with torch.no_grad():
            seen.append((len(layers), *before, run(layers, inputs.pick(rows)).clone()))
        return report

    method.recovery.tune = witness
    model, reports = prune_model(tmp_path, method=method, propagate=propagate)
    assert [number for number, *_ in seen] == [1, 2, 2]
    embedded, first_target = FAMILIES["llama"]().model.embed_tokens(IDS), seen[0][3]
    torch.testing.assert_close(seen[1][1], embedded)  # the second window begins where the first did
    if propagate != "dense":
        torch.testing.assert_close(seen[2][1], layer_output(model, 0, embedded), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(seen[2][1], first_target)
    for (_, left), (began, _) in pairwise(weights):
        newest = f"{max(left)[0]}."
        before = {key.removeprefix(newest): tensor for key, tensor in left.items() if key.startswith(newest)}
        assert before and all(torch.equal(began[f"0.{key}"], tensor) for key, tensor in before.items())
    for report, (_, _, *outputs) in zip(reports[:-1], seen, strict=False):
        before, target, after = (one[-1] for one in outputs)  # one sequence is held out
        wanted = [((one - target).square().sum(-1) / target.square().sum(-1)).mean().item() for one in (before, after)]
        found = report["recovered"]["after"]
        assert [found["loss_before"], found["loss_after"]] == pytest.approx(wanted, rel=1e-3)
        assert found["loss_after"] < found["loss_before"]


@pytest.mark.parametrize("propagate", ["pruned", "dense", "sequential"])
def test_where_layers_are_changes_nothing(propagate, tiny_config, tmp_path, device):
    settings = ("pruner=alps", "sparsity=2:4", "recover=window", "recover.epochs_after=2", f"propagate={propagate}")
    places = (("host", "host"), ("disk", "disk"), ("device", "device"))
    runs = [
        run(tiny_config(*settings, f"outputs={tmp_path / layers}", f"runtime.layers={layers}", f"runtime.activations={states}"))
        for layers, states in places
    ]
    for other in runs[1:]:
        if device == "cuda":  # gradients of attention are summed in any order there
            assert other.metrics == pytest.approx(runs[0].metrics, rel=1e-2)
            continue
        assert other.recovered == runs[0].recovered
        assert other.metrics == runs[0].metrics


def test_layers_that_were_tuned_before_are_tuned_at_another_rate(tmp_path):
    """With a rate next to nothing, only the first window moves the first layer."""
    first, last = [], []
    for earlier_lr in (1e-12, 1.0):
        for num_layers, found in ((1, first), (2, last)):
            method = Method(SparseGPT(), recovery=recover(0, 3, num_layers=num_layers, earlier_lr=earlier_lr, lr=3e-3))
            model, _ = prune_model(tmp_path / f"{earlier_lr}-{num_layers}", method=method)
            found.append(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(*first)
    torch.testing.assert_close(last[0], first[0])
    assert not torch.allclose(last[1], first[1])


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("propagate", ["pruned", "sequential"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt_post_norm_projected"])
def test_the_last_layers_are_tuned_towards_the_logits(name, propagate, num_layers, tmp_path, monkeypatch, device):
    """The loss in the report is the divergence that the saved model has on what was held out, also in parts of five tokens."""
    monkeypatch.setitem(logits.LOGITS, device, 264 * 5)
    model = larger(FAMILIES[name]())
    dense, models = copy.deepcopy(model), {}
    for towards_logits in (False, True):
        method = Method(SparseGPT(), recovery=recover(0, 3, num_layers=num_layers, lr=3e-3, logits_epochs=4 * towards_logits))
        again = {"method": method, "model": copy.deepcopy(model), "propagate": propagate, "device": device}
        models[towards_logits], reports = prune_model(tmp_path / str(towards_logits), **again)
    with torch.no_grad():
        wanted, found = (one(IDS[4:]).logits.log_softmax(-1) for one in (dense, models[True]))
    divergence = kl_div(found, wanted, reduction="sum", log_target=True) / found.shape[1]
    after = reports[-1]["recovered"]["after"]
    assert after["epoch"] == 4, "it has epochs of its own"
    assert after["loss_after"] == pytest.approx(divergence.item(), rel=1e-3)
    assert after["loss_after"] < after["loss_before"]
    first = [one.state_dict() for one in (models[True].get_decoder().layers[0], models[False].get_decoder().layers[0])]
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if device == "cuda" else {"rtol": 0, "atol": 0}
    for key, tensor in first[0].items():
        torch.testing.assert_close(tensor, first[1][key], msg="earlier layers are tuned as before", **tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_of_16_bit_models(dtype, tiny_config, device):
    settings = ("pruner=wanda", "sparsity=2:4", "recover=window", "recover.epochs_after=2")
    last = run(tiny_config(*settings, f"model.dtype={dtype}")).recovered[-1]["after"]
    assert 0 < last["loss_after"] < last["loss_before"]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("recover.logits_epochs=-1", "recover.logits_epochs=-1: must be a whole number"),
        ("recover.logits_lr=0", "recover.logits_lr=0: must be a number greater than 0"),
        ("recover.lr=0", "recover.lr=0: must be a number greater than 0"),
        ("recover.num_layers=9", "recover.num_layers=9: tiny-opt has 2 decoder layers; set no more"),
    ],
)
def test_settings_that_cannot_be(setting, reason, tiny_config):
    assert failure(tiny_config("recover=window", setting)).startswith(reason)


def layer_output(model, index, hidden):
    rotary = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    with torch.no_grad():
        return model.model.layers[index](hidden, position_embeddings=rotary)


def write_and_die(layer_files, write, finished, index, *args):
    write(index, *args)
    if index == finished:
        layer_files.finish()
        raise KeyboardInterrupt


@pytest.mark.parametrize("propagate", ["pruned", "dense", "sequential"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, propagate, num_layers):
    wanted, reports = prune_model(tmp_path / "a", method=windows(num_layers), propagate=propagate)
    for finished in range(3):
        folder = tmp_path / str(finished)
        engine = engine_of(FAMILIES["llama"](), folder)
        killed = partial(write_and_die, engine.store.layer_files, engine.store.layer_files.write, finished)
        engine.store.layer_files.write = killed
        plan = dict.fromkeys(engine.decoder.shapes(), NM(2, 4))
        with pytest.raises(KeyboardInterrupt):
            prune(engine, windows(num_layers), plan, IDS, propagate)
        model = FAMILIES["llama"]()
        engine = engine_of(model, folder)
        assert sorted(engine.store.layer_files.reports) == list(range(finished + 1))
        again = prune(engine, windows(num_layers), plan, IDS, propagate)
        for name, tensor in wanted.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
        timeless = [[{k: v for k, v in one.items() if k != "seconds"} for one in report["linears"]] for report in again]
        assert timeless == [
            [{k: v for k, v in one.items() if k != "seconds"} for one in report["linears"]] for report in reports
        ]


def test_a_damaged_file_of_carried_layers_is_not_read(tmp_path, caplog):
    engine = engine_of(FAMILIES["llama"](), tmp_path)
    files = engine.store.layer_files
    prune(engine, windows(2), dict.fromkeys(engine.decoder.shapes(), NM(2, 4)), IDS)
    files.finish()
    assert list(files.folder.glob("carried-*")) == []
    carried = ({2: {"linears": []}}, lambda: {f"{files.prefix}.2.weight": torch.ones(2)})
    files.write(1, lambda: {"weight": torch.ones(2)}, {}, carried)
    files.finish()
    (path,) = files.folder.glob("carried-*")
    (files.folder / "layer-0002.json").unlink()
    found = LayerFiles(files.folder, files.prefix)
    assert list(found.reports) == [0, 1]
    assert found.carried == {2: {"linears": []}}
    torch.testing.assert_close(found.read_carried(2), {"weight": torch.ones(2)})
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    caplog.clear()
    assert list(LayerFiles(files.folder, files.prefix).reports) == []
    assert caplog.messages == [f"warning: {path} is missing or damaged: layer 0 and later ones are pruned again"]


def test_evaluations_see_the_final_layers(tmp_path):
    model = FAMILIES["llama"]()
    engine = engine_of(model, tmp_path)
    plan = dict.fromkeys(engine.decoder.shapes(), NM(2, 4))
    ids = random_ids(rows=3, seed=5)
    with engine.hidden_states(ids, "windows") as states:
        PruningPass(engine, [PruneTask(windows(2), plan, engine.store.layer_files)], "pruned").run(IDS, pruned=[states])
        found = states.activations.tensor.clone()
    with through_layers(engine, ids) as states:
        torch.testing.assert_close(found, states.activations.tensor)
