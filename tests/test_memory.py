"""Device memory: the arithmetic against measured peaks, and what is chosen where it is short."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import compose_config
from support.engine import IDS, engine_of, prune
from support.families import FAMILIES
from support.memory import peak_bytes

from nnprune.engine.hidden_buffer import _fits
from nnprune.engine.logits import LOGITS
from nnprune.engine.memory import Workload, fit_device, groups_of
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.experiment.build import build
from nnprune.experiment.job import Job
from nnprune.experiment.preparation import open_engine, skeleton, workload
from nnprune.kernels import library
from nnprune.patterns import NM
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.runtime import Runtime

GIB = 1 << 30
SEQ_LEN = 64


@pytest.fixture
def engine(tmp_path):
    """Llama-3-8B's proportions at a sixteenth of its width."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 4, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, pad_token_id=0, **shape)
    library.enable(False)
    yield engine_of(transformers.AutoModelForCausalLM.from_config(config).eval(), tmp_path, batch_tokens=256)
    library.enable(True)


def load_of(engine, method, propagate, tokens):
    shapes = engine.decoder.shapes_by_layer()[0]
    return Workload(shapes, groups_of(engine), [method], propagate, 4, 256, SEQ_LEN, 64, tokens, 0)


@pytest.mark.parametrize(
    "name",
    ["wanda", "sparsegpt", "alps", "alps one_by_one", "sparsegpt_refit", "best_fast", "best_medium", "best", "alps window"],
)
def test_the_estimate_is_near_the_measured_peak(name, engine):
    name, _, how = name.partition(" ")
    more = ["recover=window"] * (how == "window")
    more += ["recover.epochs_after=1"] * (how == "window" or name in ("best_medium", "best"))
    config = compose_config(f"pruner={name}", "sparsity=2:4", *more)
    method, propagate = build(config).method, config.propagate
    ids = torch.randint(3, 64, (16, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    load, engine.runtime.one_by_one = load_of(engine, method, propagate, ids.numel()), how == "one_by_one"
    plan = dict.fromkeys(engine.decoder.shapes(), NM(2, 4))
    task = PruneTask(method, plan, engine.store.layer_files)
    measured = peak_bytes(lambda: PruningPass(engine, [task], propagate).run(ids))
    estimated = sum(load.hidden_bytes()) + load.workspace_bytes(engine.runtime)
    assert 0.9 * measured <= estimated <= 1.5 * measured


def test_one_linear_at_a_time_takes_less_and_prunes_alike(tmp_path):
    found, peaks = [], []
    for one_by_one in (False, True):
        model = FAMILIES["llama"]()
        engine = engine_of(model, tmp_path / str(one_by_one))
        engine.runtime.one_by_one = one_by_one
        peaks.append(
            peak_bytes(lambda engine=engine: prune(engine, Wide(), dict.fromkeys(engine.decoder.shapes(), NM(2, 4)), IDS))
        )
        found.append(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(*found)
    assert peaks[1] < peaks[0]


class Wide(SparseGPT):
    """Takes so much memory for each output that this is what its peak shows."""

    def prune_stack(self, weight_IO, sizes, pattern, names):
        _ = weight_IO.new_empty(1 << 14, weight_IO.shape[1])
        return super().prune_stack(weight_IO, sizes, pattern, names)


def llama(methods, propagate, width):
    """Llama-3-8B, whose MLP has a `width` of 14336, with as many tokens as in the papers."""
    attention = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
    shapes = attention | {"gate": (width, 4096), "up": (width, 4096), "down": (4096, width)}
    groups = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    return Workload(shapes, groups, methods, propagate, 2, 4096, 2048, 128256, 128 * 2048, 2 * 141 * 2048)


EMBEDDINGS = 2 * 128256 * 4096 * 2


def chosen(name, memory, width=14336):
    """The runtime of `llama` on a device of so many GiB, and whether it fits."""
    config = compose_config(f"pruner={name}", "sparsity=2:4")
    runtime = Runtime(device="cpu", batch_tokens=16384)
    load = llama([build(config).method], config.propagate, width)
    return runtime, fit_device(runtime, load, memory * GIB - EMBEDDINGS)


@pytest.mark.parametrize(
    ("name", "memory"), [("sparsegpt", 12), ("alps", 12), ("best_fast", 16), ("best_medium", 16), ("best", 16)]
)
def test_llama_3_8b_fits_small_devices_at_full_batches(name, memory, monkeypatch):
    monkeypatch.setitem(LOGITS, "cpu", LOGITS["cuda"])
    runtime, fits = chosen(name, memory)
    assert fits and runtime.activations == "host" and runtime.batch_tokens == 16384 and not runtime.one_by_one


@pytest.mark.parametrize(
    ("name", "memory", "width", "tokens", "one_by_one"),
    [("alps", 12, 8192, 16384, False), ("alps", 5, 8192, 16384, True), ("wanda", 5, 14336, 8192, True)],
)
def test_what_is_short_is_made_smaller_in_turn(name, memory, width, tokens, one_by_one, caplog):
    caplog.set_level("INFO")
    runtime, fits = chosen(name, memory, width)
    assert fits and (runtime.activations, runtime.batch_tokens, runtime.one_by_one) == ("host", tokens, one_by_one)
    assert f"batches of {tokens} tokens, hidden states in host memory" in caplog.text
    assert ("one linear at a time" in caplog.text) == one_by_one
    assert not chosen(name, 3.5, width)[1]


@pytest.mark.parametrize(("layers", "absent", "fits"), [("device", 7e9, False), ("device", 0, True), ("host", 7e9, True)])
def test_layers_that_are_to_stay_on_the_device_are_counted(layers, absent, fits):
    config = compose_config("pruner=sparsegpt", "sparsity=2:4")
    load = replace(llama([build(config).method], config.propagate, 14336), absent_parameters=int(absent))
    assert fit_device(Runtime(device="cpu", layers=layers), load, 16 * GIB - EMBEDDINGS) == fits


def test_layers_are_absent_until_they_are_fetched(tiny_config):
    experiment = build(tiny_config("runtime.layers=device"))
    engine = open_engine(experiment, skeleton(experiment, experiment.source.config()))
    nothing = (engine.decoder, [], [], torch.empty(0, 8, dtype=torch.int64), [])
    before = workload(experiment, *nothing)
    assert before.absent_parameters == before.num_parameters > 0
    engine.store.fetch(0)
    assert workload(experiment, *nothing).absent_parameters == before.num_parameters // 2


def test_where_memory_is_plenty_nothing_is_chosen_or_said(caplog):
    caplog.set_level("INFO")
    runtime, fits = chosen("alps", 100)
    assert fits and runtime.activations == "auto" and runtime.batch_tokens == 16384 and not runtime.one_by_one
    assert not caplog.messages


def test_hidden_states_leave_what_computing_needs(monkeypatch, tmp_path):
    runtime = Runtime(device="cpu")
    monkeypatch.setattr(Runtime, "free_device_bytes", lambda _: 1000)
    assert _fits(runtime, 399) and not _fits(runtime, 400)
    runtime.reserved_bytes = 700
    assert _fits(runtime, 299) and not _fits(runtime, 300)


def test_a_run_says_what_it_chose_or_what_it_lacks(tiny_config, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(Runtime, "free_device_bytes", lambda _: 700_000)
    record = Job(build(tiny_config("pruner=sparsegpt"))).run()
    assert record.status == "completed"
    assert "device memory 0.0 GiB: batches of" in caplog.text and "hidden states in host memory" in caplog.text
    monkeypatch.setattr(Runtime, "free_device_bytes", lambda _: 1 << 12)
    with pytest.raises(
        ValueError, match=r"runtime.device_memory=null: needs .* GiB beside embeddings and head, there are .*; use"
    ):
        Job(build(tiny_config("pruner=sparsegpt", "overwrite=true")))


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("12GiB", 12 * GIB), ("12gb", 12 * 10**9), ("1.5 GiB", 3 * GIB // 2), (12 * GIB, 12 * GIB), ("x", None)],
)
def test_sizes(text, num_bytes):
    runtime = Runtime(device="cpu")
    runtime.device_memory = text
    assert runtime.device_memory_bytes == num_bytes


@pytest.fixture
def card(monkeypatch):
    """A stand-in for a card of 24 GiB: 10 are free, 3 allocated, 2 kept by the allocator, the rest belongs to others."""
    monkeypatch.setattr(Runtime, "torch_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * GIB)


@pytest.mark.parametrize(("memory", "free"), [(None, 12), ("24GiB", 12), ("8GiB", 5)])
def test_what_is_free_knows_the_limit(card, memory, free):
    assert Runtime(device_memory=memory).free_device_bytes() == free * GIB


@pytest.mark.parametrize(
    ("memory", "reason"), [("25GiB", "the device has 24.0 GiB"), ("12", "at least 1GiB"), (True, "must be a size")]
)
def test_limits_that_make_no_sense(card, memory, reason):
    with pytest.raises(ValueError, match=rf"runtime.device_memory=\w+: .*{reason}"):
        Runtime(device_memory=memory)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_limit_holds_on_a_device():
    runtime = Runtime(device="cuda", device_memory="2GiB")
    runtime.start(0)
    try:
        assert 0 < runtime.free_device_bytes() <= 2 * GIB
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(3 * GIB, dtype=torch.uint8, device="cuda")
    finally:
        Runtime(device="cuda").start(0)
    torch.empty(3 * GIB, dtype=torch.uint8, device="cuda")
