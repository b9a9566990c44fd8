"""The layer-wise engine: what later linears see, where things rest, resuming, saving."""

import json
from pathlib import Path

import pytest
import torch
from conftest import compose_config, save_random
from support.engine import (
    ATOL,
    IDS,
    Failing,
    Interrupted,
    Witness,
    engine_of,
    expected_inputs,
    prune,
    prune_model,
    through_layers,
)
from support.families import FAMILIES, VOCAB_SIZE
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig

from nnprune.model.decoder import run_layer
from nnprune.model.weight_views import WeightView
from nnprune.patterns import NM, Unstructured
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.pruners.wanda import Wanda
from nnprune.run import run
from nnprune.runtime import Runtime
from nnprune.solvers.layer_error import relative_error


@pytest.mark.parametrize("propagate", ["pruned", "dense", "sequential"])
def test_what_each_linear_sees(propagate, tmp_path, device):
    dense = FAMILIES["llama"]().state_dict()
    witness = Witness()
    model, _ = prune_model(tmp_path, method=witness, propagate=propagate, batch_tokens=32, device=device)
    expected = expected_inputs(dense, model.state_dict(), propagate)
    assert witness.seen.keys() == expected.keys()
    for name, X in expected.items():
        torch.testing.assert_close(
            witness.seen[name], X.T @ X / len(X), rtol=1e-4, atol=ATOL[device], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("runtime", [{"batch_tokens": 16}, {"batch_tokens": 80, "activations": "disk"}, {"layers": "device"}])
def test_where_things_rest_does_not_change_the_result(runtime, tmp_path, device):
    first, _ = prune_model(tmp_path / "a", method=Wanda(), batch_tokens=80, device=device)
    second, _ = prune_model(tmp_path / "b", method=Wanda(), **runtime, device=device)
    for (name, one), two in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, two), name  # Wanda keeps weights as they are, so that equal masks are equal weights
    assert not list((tmp_path / "b").glob("activations*"))


def test_reports(tmp_path, device):
    model, reports = prune_model(tmp_path, family="opt", device=device)
    assert len(reports) == 3
    dense = FAMILIES["opt"]()
    for report in reports:
        assert report["linear_zeros"] == report["linear_size"] // 2
        for linear in report["linears"]:
            assert linear["sparsity"] == 0.5
            assert 0 < linear["relative_error"] < 1
            assert linear["seconds"] > 0
    linear = reports[0]["linears"][0]
    captured = []
    module = dense.get_submodule(linear["name"])
    module.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    with torch.no_grad():
        dense(IDS)
    W, pruned = (WeightView(one).read() for one in (module, model.get_submodule(linear["name"])))
    expected = float(relative_error(W, pruned, captured[0].reshape(-1, 32).float()))
    assert linear["relative_error"] == pytest.approx(expected, rel=1e-3)


class Counting(Wanda):
    def __init__(self):
        self.names = []

    def prune_linear(self, W, module_name, pattern):
        self.names.append(module_name)
        return super().prune_linear(W, module_name, pattern)


@pytest.mark.parametrize("propagate", ["pruned", "dense", "sequential"])
def test_an_interrupted_run_goes_on_to_the_same_bits(propagate, tmp_path, device):
    whole, expected = prune_model(tmp_path / "whole", method=Wanda(), propagate=propagate, batch_tokens=32, device=device)
    with pytest.raises(Interrupted):
        prune_model(
            tmp_path / "cut",
            method=Failing("model.layers.1.mlp.down_proj"),
            propagate=propagate,
            batch_tokens=32,
            device=device,
        )
    (tmp_path / "cut" / "layers" / ".layer-0001.safetensors.1.tmp").write_bytes(b"half")
    counting = Counting()
    resumed, reports = prune_model(tmp_path / "cut", method=counting, propagate=propagate, batch_tokens=32, device=device)
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in counting.names)
    assert len(counting.names) == 14
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    strip = [[{**linear, "seconds": 0} for linear in report["linears"]] for report in reports]
    assert strip == [[{**linear, "seconds": 0} for linear in report["linears"]] for report in expected]


def test_a_finished_pruning_is_only_read_again(tmp_path, device):
    whole, _ = prune_model(tmp_path, method=Wanda(), device=device)
    counting = Counting()
    again, _ = prune_model(tmp_path, method=counting, device=device)
    assert counting.names == []
    engine = engine_of(again, tmp_path, device)
    with through_layers(engine, IDS[:1]) as stream:
        [(_, _, logits)] = stream.logits()
        torch.testing.assert_close(logits.cpu(), whole(IDS[:1]).logits[0])


@pytest.mark.parametrize("family", ["opt_post_norm_projected", "llama", "gemma3", "gpt2", "bloom", "falcon", "gpt_neox"])
@pytest.mark.parametrize("layers", ["host", "disk"])
def test_saved_model_is_an_ordinary_directory_with_equal_logits(family, layers, tiny_model_dir, tmp_path, device):
    source = tmp_path / family
    model = FAMILIES[family]()
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(source)
    cfg = compose_config(
        "model=local",
        f"model.path={source}",
        "calibration=random",
        "calibration.num_samples=4",
        "calibration.seq_len=16",
        "evaluation=none",
        "evaluation.seq_len=16",
        "pruner=wanda",
        "sparsity=2:4",
        "save=true",
        f"runtime.layers={layers}",
        f"runtime.device={device}",
        f"outputs={tmp_path / 'outputs'}",
    )
    record = run(cfg)
    [folder] = tmp_path.glob("outputs/*/2of4/*/model")
    assert "sparsity" not in (folder / "config.json").read_text()
    assert json.loads((folder / "pruning.json").read_text())["fingerprint"] == record.fingerprint
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    engine = engine_of(model, tmp_path / "again", device)
    plan = dict.fromkeys(engine.decoder.shapes(), NM(2, 4))
    ids = torch.randint(VOCAB_SIZE, (4, 16), generator=torch.Generator().manual_seed(0))
    prune(engine, Wanda(), plan, ids)
    assert torch.equal(loaded.eval()(IDS).logits, model.cpu()(IDS).logits)
    assert AutoTokenizer.from_pretrained(folder)("ab").input_ids


def test_at_most_two_layers_are_off_the_meta_device(tiny_config, tiny_model_dir, monkeypatch, tmp_path, device):
    from nnprune.engine.layer_store import LayerStore

    resident = []
    fetch = LayerStore.fetch

    def watched(self, index, pruned=True):
        layer = fetch(self, index, pruned)
        resident.append(sum(any(not p.is_meta for p in other.parameters()) for other in self.decoder.layers))
        return layer

    monkeypatch.setattr(LayerStore, "fetch", watched)
    config = OPTConfig(**json.loads((tiny_model_dir / "config.json").read_text()) | {"num_hidden_layers": 5})
    deep = tmp_path / "deep"
    save_random(config, deep)
    disk = run(tiny_config(f"model.path={deep}", "runtime=low_memory", "pruner=wanda"))
    assert set(resident) == {1, 2}
    monkeypatch.undo()
    host = run(tiny_config(f"model.path={deep}", "pruner=wanda", f"outputs={tmp_path / 'host'}"))
    assert disk.metrics == host.metrics
    assert disk.fingerprint == host.fingerprint


def test_runtime_defaults_to_what_there_is():
    runtime = Runtime(**compose_config().runtime)
    assert runtime.torch_device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_layer_that_returns_something_else_is_refused():
    from nnprune.model.decoder import LayerCall

    with pytest.raises(ValueError, match="instead of hidden states"):
        run_layer(lambda hidden: hidden[0], torch.zeros(2, 3, 4), LayerCall((), {}))


def test_files_have_the_users_permissions(tmp_path, device):
    prune_model(tmp_path, method=Wanda(), device=device)
    (tmp_path / "ordinary").touch()
    for path in (tmp_path / "layers").iterdir():
        assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_dtype(dtype, tiny_config, device):
    record = run(tiny_config("pruner=sparsegpt", "sparsity=2:4", f"model.dtype={dtype}", "save=true"))
    assert record.linear_sparsity == 0.5
    [folder] = Path(record.config["outputs"]).glob("*/2of4/*/model")
    assert str(AutoModelForCausalLM.from_pretrained(folder).dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("propagate", ["pruned", "sequential"])
def test_out_of_memory_halves_the_batch_and_counts_no_token_twice(propagate, tmp_path, device):
    reference, witness = Witness(), Witness()
    prune_model(tmp_path / "a", method=reference, propagate=propagate, batch_tokens=32, device=device)
    model = FAMILIES["llama"]()

    def small_device(module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(small_device)  # the other linears have been seen by then
    prune_model(tmp_path / "b", method=witness, propagate=propagate, model=model, batch_tokens=64, device=device)
    assert witness.seen.keys() == reference.seen.keys()
    for name, hessian in reference.seen.items():
        torch.testing.assert_close(witness.seen[name], hessian)


def test_the_record_tells_of_halved_batches(tiny_config, monkeypatch, device):
    from nnprune.engine.hidden_states import HiddenStates

    original = HiddenStates.run

    def small_device(self, index, layer, hidden):
        if len(hidden) > 2:
            raise torch.OutOfMemoryError
        return original(self, index, layer, hidden)

    monkeypatch.setattr(HiddenStates, "run", small_device)
    assert run(tiny_config("pruner=wanda")).notes == ["short of device memory: runtime.batch_tokens=64"]


def test_a_row_that_does_not_fit_is_an_error(tmp_path, device):
    model = FAMILIES["llama"]()

    def no_device(module, args):
        raise torch.OutOfMemoryError

    model.model.layers[0].register_forward_pre_hook(no_device)
    with pytest.raises(torch.OutOfMemoryError):
        prune_model(tmp_path, model=model, device=device)


def test_linears_that_the_plan_leaves_dense_stay_as_they_are(tmp_path, device):
    model, before = FAMILIES["llama"](), FAMILIES["llama"]().state_dict()
    engine = engine_of(model, tmp_path, device)
    plan = {name: NM(2, 4) if "mlp" in name else Unstructured(0.0) for name in engine.decoder.shapes()}
    prune(engine, SparseGPT(), plan, IDS)
    for name, tensor in model.cpu().state_dict().items():
        assert torch.equal(tensor, before[name]) == (".mlp." not in name), name
