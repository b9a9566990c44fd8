"""The benchmark compares equals: programs without shared code, given the same ids, prune the same weights."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, save_random
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(ROOT))  # `benchmarks` is no part of the installed package

from benchmarks.flops import layer_shapes, useful_flops
from benchmarks.products import PRODUCTS, ProductProfile
from benchmarks.programs import llmcompressor


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    """A random Llama of 2 layers whose weights are large enough for pruning to matter."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return save_random(config, folder)


def test_nnprune_and_the_official_loop_prune_alike(llama_dir, small_text, tmp_path):
    report, work = tmp_path / "report.json", tmp_path / "work"
    command = f"""--model {llama_dir} --calibration {small_text} --evaluation {small_text} --method sparsegpt --pattern 2:4
        --num-samples 6 --seq-len 32 --max-windows 5 --dtype float32 --device cpu --threads 1 --rounds 1
        --peers nnprune,official,nn-pruning --json {report} --work {work}"""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "engine.py", *command.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows == ["program", ":---", "dense", "nnprune", "official"]
    assert "nn-pruning skipped: no checkout" in done.stdout

    measured = json.loads(report.read_text())
    ours, official = measured["programs"]["nnprune"], measured["programs"]["official"]
    assert abs(ours["perplexity"] / measured["dense_perplexity"] - 1) > 0.01  # else the next line shows nothing
    assert ours["perplexity"] == pytest.approx(official["perplexity"], rel=0.005)
    assert ours["sparsity"] == official["sparsity"] == 0.5
    for program in (ours, official):
        assert 0 < program["prune_seconds_median"] < program["process_seconds"][0]
        assert program["flops_per_second"] > 0
    ours, official = (AutoModelForCausalLM.from_pretrained(work / f"{name}-model") for name in ("nnprune", "official"))
    same = [
        (mine == 0).eq(theirs == 0).flatten()
        for (name, mine), theirs in zip(ours.named_parameters(), official.parameters(), strict=True)
        if "_proj" in name
    ]
    assert len(same) == 14
    assert torch.cat(same).float().mean() > 0.99


def test_useful_flops_of_a_tiny_llama(llama_dir):
    layers = layer_shapes(AutoModelForCausalLM.from_pretrained(llama_dir))
    assert [layer.inputs for layer in layers] == [(32, 32, 32, 64)] * 2  # q, k, v share one; gate and up another
    samples, tokens = 3, 5
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    products, attention = 2 * samples * tokens * weights, samples * sum(4 * 32 * position for position in range(1, tokens + 1))
    parts = useful_flops(layers, "sparsegpt", samples, tokens)
    assert parts["forwards"] == 2 * 2 * (products + attention)
    assert parts["statistics"] == 2 * 2 * samples * tokens * (3 * 32**2 + 64**2)
    solver = 4 / 3 * (3 * 32**3 + 64**3) + 2 * 32 * 32**2 + 2 * 16 * 32**2 + 2 * 64 * 32**2 + 32 * 64**2
    assert parts["solver"] == pytest.approx(2 * solver)
    assert useful_flops(layers, "wanda", samples, tokens)["solver"] == 0


def test_profiles_count_nested_products_once():
    linear, x = torch.nn.Linear(512, 512), torch.randn(512, 512)
    with torch.no_grad(), ProductProfile() as products:
        for _ in range(20):
            linear(x)
    with torch.no_grad(), ProductProfile() as others:
        for _ in range(20):
            x.sort(dim=1)
    assert 0.5 < products.shares()["products"] <= 1
    assert others.shares()["products"] == 0


def test_every_product_of_our_own_kernels_counts():
    sources = (ROOT / "nnprune" / "kernels").glob("*.py")
    names = {name for source in sources for name in re.findall(r'record_function\("(.*?)"\)', source.read_text())}
    assert names and names <= PRODUCTS


def test_an_interpreter_is_found_from_the_folder_at_hand(tmp_path, monkeypatch):
    """It is asked, and started, in other folders. A virtual environment's is a link that must stay one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    program = llmcompressor("bin/python")
    assert program.python == os.path.join(tmp_path, "bin", "python")
    assert program.missing is None or program.missing.startswith("not installed for")
