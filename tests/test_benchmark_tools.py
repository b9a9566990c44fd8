"""The tools of benchmarks/memory, and solvers.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HANGS, ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(ROOT))  # `benchmarks` is no part of the installed package

from benchmarks.memory import make_random_checkpoint

SHAPE = ["--hidden=32", "--layers=3", "--heads=4", "--ffn=64", "--vocab=4096", "--positions=64"]
HOG = "blocks = [bytearray(b'x' * 2**20) for _ in range({})]; print('survived')"
MAPPED = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    print(sum(mapped[i] for i in range(0, len(mapped), 4096)))
"""


def memory_limit(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "memory" / "memory_limit.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False)


def make_checkpoint(folder: Path, *arguments: str) -> Path:
    assert make_random_checkpoint.main([str(folder), *SHAPE, *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "opt", "--shard-gb=0.0003")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_random_checkpoint_is_an_ordinary_one(checkpoint):
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(checkpoint)("A few words.", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    layer = model.model.decoder.layers[1]
    assert float(layer.fc1.weight.detach().float().std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(layer.fc1.bias, torch.zeros(64, dtype=torch.bfloat16))
    assert torch.equal(layer.final_layer_norm.weight, torch.ones(32, dtype=torch.bfloat16))
    tensors = list(weights(checkpoint).values())
    matrices = [tensor for tensor in tensors if tensor.ndim == 2]
    assert len({tensor.float().sum().item() for tensor in matrices}) == len(matrices)  # no two from the same random numbers
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(checkpoint.glob("*.safetensors"))) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)


def test_a_random_checkpoint_depends_on_its_seed_and_not_on_its_shards(checkpoint, tmp_path):
    first = weights(checkpoint)
    same, other = weights(make_checkpoint(tmp_path / "same")), weights(make_checkpoint(tmp_path / "other", "--seed=1"))
    assert first.keys() == same.keys() == other.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].ndim == 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden=30"], "divisible"),
        (["--vocab=100"], "the tokenizer has 4096 tokens"),
        (["--preset=llama-3-8b"], "key-value heads; give --kv-heads too"),
        ([], "exists already"),
    ],
)
def test_a_random_checkpoint_that_cannot_be_made_says_why(checkpoint, tmp_path, capsys, arguments, message):
    target = tmp_path / "new" if arguments else checkpoint
    assert make_random_checkpoint.main([str(target), *SHAPE, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_memory_limit_kills_what_passes_it_and_nothing_else(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("no mechanism works without /proc")
    report = tmp_path / "report.json"
    limit = ["--limit=150MiB", f"--json={report}", "--", sys.executable, "-c"]
    # The pause is for the watchdog, which may get no time of a busy machine before the hog has ended.
    killed = memory_limit(*limit, HOG.format(300).replace("; print", "; import time; time.sleep(30); print"))
    assert killed.returncode == 137
    assert "survived" not in killed.stdout
    found = json.loads(report.read_text())
    assert found["killed_by"] in ("watchdog", "kernel")
    assert found["seconds"] < 20
    small = memory_limit(*limit, HOG.format(80))
    assert (small.returncode, small.stdout) == (0, "survived\n"), small.stderr
    file = tmp_path / "large"
    file.write_bytes(b"\1" * (200 * 2**20))
    mapped = memory_limit(*limit, MAPPED, file)
    assert (mapped.returncode, mapped.stdout) == (0, f"{200 * 256}\n"), mapped.stderr
    found = json.loads(report.read_text())
    assert found["killed_by"] is None
    assert found["peak_anon_bytes"] < 100 * 2**20
    file.unlink()


def test_memory_limit_passes_the_exit_status_on_and_measures():
    assert memory_limit("--", "sh", "-c", "exit 3").returncode == 3
    assert memory_limit("--", "sh", "-c", "kill -9 $$").returncode == 137
    missing = memory_limit("--", "no-such-command")
    assert missing.returncode == 1
    assert "No such file" in missing.stderr
    unlimited = memory_limit("--", sys.executable, "-c", HOG.format(100) + "; import time; time.sleep(0.3)")
    assert "no limit; exit status 0" in unlimited.stderr
    anonymous = int(unlimited.stderr.split("anonymous ")[1].split(" MiB")[0])
    assert 100 <= anonymous < 200


@pytest.mark.parametrize("size", ["5X", "iB", "5iB", "-1", ""])
def test_memory_limit_refuses_what_is_no_size(size):
    refused = memory_limit(f"--limit={size}", "--", "true")
    assert refused.returncode == 2
    assert "invalid parse_size value" in refused.stderr


def test_solvers_compares_methods_on_a_layer(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/solvers.py", "--model=demo", "--calibration=demo:calibration.txt", "--layers=1"]
    options = [
        "--num-samples=2",
        "--seq-len=128",
        "--patterns=2:4",
        "--methods=wanda_refit,alps,official",
        "--rounds=1",
        "--threads=1",
    ]
    found = subprocess.run([*command, *options, f"--json={out}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    results = json.loads(out.read_text())["results"]["2:4"]
    assert results["sparsegpt"]["error"] == results["sparsegpt"]["time"] == 1
    assert abs(results["official"]["error"] - 1) < 0.1  # many inputs are dead, and then it is rounding that decides
    assert results["alps"]["error"] < results["wanda_refit"]["error"]
    assert "| alps |" in found.stdout
