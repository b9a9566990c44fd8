"""`model.dtype=auto`: what a 16-bit checkpoint computes in, and that what is measured is what is saved."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nnprune.evaluation import Evaluation
from nnprune.model import dtypes
from nnprune.model.dtypes import choose_computing_dtype, cpu_multiplies_bfloat16
from nnprune.run import run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[False, True], ids=["no units", "units"])
def has_units(request, monkeypatch):
    """A CPU without, and one with, units for bfloat16."""
    monkeypatch.setattr(dtypes, "cpu_multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.fixture
def checkpoint_in(tiny_model_dir, tmp_path):
    """`checkpoint_in(dtype)`: the tiny model stored in another dtype."""

    def save(dtype):
        folder = tmp_path / f"model-{dtype}"
        shutil.copytree(tiny_model_dir, folder)
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return save


def plain_perplexity(folder, small_text, dtype):
    """Perplexity of five windows of 32 tokens by the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = Evaluation({}, 32, 5, str(small_text)).token_ids(AutoTokenizer.from_pretrained(folder))["text"]
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("stored", "with_units", "without"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
    ],
)
def test_choice_on_a_cpu(stored, with_units, without, has_units):
    assert choose_computing_dtype(stored, CPU) == (with_units if has_units else without)


@pytest.mark.parametrize("emulated", [False, True])
def test_choice_on_cuda(emulated, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not emulated)
    assert choose_computing_dtype(torch.float16, CUDA) == torch.float16
    assert choose_computing_dtype(torch.bfloat16, CUDA) == (torch.float32 if emulated else torch.bfloat16)


def test_a_processor_that_claims_no_units_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    monkeypatch.setattr(dtypes, "_product_seconds", lambda dtype: pytest.fail("timed"))
    cpu_multiplies_bfloat16.cache_clear()
    try:
        assert not cpu_multiplies_bfloat16()
    finally:
        cpu_multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize("slower", ["bfloat16", "float32"])
def test_a_processor_that_claims_units_must_show_them(slower, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(dtypes, "_product_seconds", lambda dtype: 2.0 if str(dtype).endswith(slower) else 1.0)
    cpu_multiplies_bfloat16.cache_clear()
    try:
        assert cpu_multiplies_bfloat16() == (slower == "float32")
    finally:
        cpu_multiplies_bfloat16.cache_clear()


METHODS = {
    "wanda": ["pruner=wanda"],
    "sparsegpt": ["pruner=sparsegpt"],
    "sequential": ["pruner=alps", "target=asymmetric", "propagate=sequential"],
    "recover": ["pruner=sparsegpt", "recover=layer", "recover.epochs_after=1"],
    "recover before": ["pruner=wanda", "recover=next_layer", "recover.epochs_before=1"],
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("runtime", ["auto", "low_memory"])
def test_what_is_measured_in_float32_is_what_is_saved(
    dtype, method, runtime, checkpoint_in, small_text, tiny_config, monkeypatch
):
    monkeypatch.setattr(dtypes, "cpu_multiplies_bfloat16", lambda: False)
    settings = [f"model.path={checkpoint_in(dtype)}", "sparsity=2:4", "save=true", "overwrite=true", *METHODS[method]]
    record = run(tiny_config(*settings, f"runtime={runtime}", "runtime.device=cpu"))
    assert record.dtype == "float32"
    [folder] = Path(record.config["outputs"]).glob("*/2of4/*/model")
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in saved.parameters()} == {getattr(torch, dtype)}
    assert record.metrics["text_perplexity"] == pytest.approx(plain_perplexity(folder, small_text, torch.float32), rel=1e-5)


def test_layers_in_memory_and_on_disk_give_the_same_figures(checkpoint_in, tiny_config, tmp_path, has_units):
    settings = [f"model.path={checkpoint_in('bfloat16')}", "pruner=sparsegpt", "sparsity=0.5", "runtime.device=cpu"]
    memory = run(tiny_config(*settings))
    disk = run(tiny_config(*settings, "runtime.layers=disk", f"outputs={tmp_path / 'disk'}"))
    assert memory.metrics == disk.metrics
    assert memory.dense_metrics == disk.dense_metrics
    assert memory.dtype == disk.dtype == ("bfloat16" if has_units else "float32")


def test_the_computing_dtype_is_part_of_the_identity(checkpoint_in, tiny_config, monkeypatch, caplog):
    settings = [f"model.path={checkpoint_in('bfloat16')}", "pruner=wanda", "runtime.device=cpu"]
    records = []
    for has_units in (False, True):
        monkeypatch.setattr(dtypes, "cpu_multiplies_bfloat16", lambda has_units=has_units: has_units)
        with caplog.at_level("INFO", "nnprune"):
            caplog.clear()
            records.append(run(tiny_config(*settings)))
        line = "computing in float32: this CPU has no units for the checkpoint's bfloat16"
        assert (line in caplog.text) == (not has_units)
    assert records[0].fingerprint != records[1].fingerprint
    forced = run(tiny_config(*settings, "model.dtype=bfloat16"))
    assert forced.fingerprint == records[1].fingerprint, "auto and the dtype that it chooses are one experiment"
    assert run(tiny_config(*settings, "model.dtype=float32")).fingerprint not in {record.fingerprint for record in records}


def test_a_dtype_that_is_asked_for_is_computed_in_and_saved(checkpoint_in, tiny_config, has_units):
    record = run(tiny_config(f"model.path={checkpoint_in('bfloat16')}", "model.dtype=float32", "save=true", "pruner=wanda"))
    assert record.dtype == "float32"
    [folder] = Path(record.config["outputs"]).glob("*/0.5/*/model")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
