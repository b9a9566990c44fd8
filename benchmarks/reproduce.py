"""The cost estimates of docs/reproduce.md: `plan=true` for each model of a table, on this machine and without a network.

    python -m benchmarks.reproduce [MODEL ...]           seconds, memory and disk
    python -m benchmarks.reproduce --sizes [MODEL ...]   memory and disk only, in seconds

Where the real repositories can be reached, `python -m nnprune.run experiment=opt_table plan=true` does the same. Here they come
from a hub on 127.0.0.1, with configurations of the real shapes, a byte tokenizer and texts that make as many windows.
"""

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import yaml
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, Qwen3Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import byte_tokenizer  # noqa: E402
from support.fakehub import Hub  # noqa: E402
from support.repositories import C4  # noqa: E402

WINDOWS = {"opt": 140, "llama2": 166, "llama3": 141, "llama3.2": 141, "qwen3": 146}
"""Windows of 2048 tokens that each family's tokenizer makes of WikiText-2's test split."""

PRUNERS = ("magnitude", "wanda", "sparsegpt")


def opt(hidden: int, layers: int, heads: int, **more: int | bool) -> OPTConfig:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return OPTConfig(**{"word_embed_proj_dim": hidden, **sizes, **more}, vocab_size=50272, dtype="float16")


def llama(hidden: int, inner: int, layers: int, heads: int, vocabulary: int, **more: object) -> LlamaConfig:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    return LlamaConfig(**{"dtype": "bfloat16", **sizes, **more}, vocab_size=vocabulary, max_position_embeddings=4096)


def qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    shared = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "dtype": "bfloat16"}
    return Qwen3Config(**sizes, **shared, tie_word_embeddings=tied)


SHAPES = {
    "opt-125m": opt(768, 12, 12),
    "opt-350m": opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": opt(2048, 24, 32),
    "opt-2.7b": opt(2560, 32, 32),
    "opt-6.7b": opt(4096, 32, 32),
    "opt-13b": opt(5120, 40, 40),
    "llama3.2-1b": llama(2048, 8192, 16, 32, 128256, num_key_value_heads=8, tie_word_embeddings=True),
    "llama2-7b": llama(4096, 11008, 32, 32, 32000, dtype="float16"),
    "llama3-8b": llama(4096, 14336, 32, 32, 128256, num_key_value_heads=8),
    "llama2-13b": llama(5120, 13824, 40, 40, 32000, dtype="float16"),
    "qwen3-0.6b": qwen3(1024, 3072, 28, 16, True),
    "qwen3-8b": qwen3(4096, 12288, 36, 32, False),
}


def make_hub(root: Path, name: str, config: PreTrainedConfig) -> None:
    """Write the repositories that a plan for one model reads: no weights, and texts of bytes in place of its tokens."""
    path = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())["path"]
    folder = root / "models" / path / "main"
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / ("pytorch_model.bin" if name.startswith("opt") else "model.safetensors")).touch()
    wikitext = root / "datasets/Salesforce/wikitext/main/wikitext-2-raw-v1/test-00000-of-00001.parquet"
    wikitext.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"text": ["x" * (2048 * WINDOWS[name.split("-")[0]] + 9)]}).to_parquet(wikitext)
    c4 = root / "datasets/allenai/c4/main" / C4
    c4.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(c4, "wt") as file:
        file.writelines(json.dumps({"text": f"{i} " * 2000}) + "\n" for i in range(200))


def ask(hub: Hub, cache: Path, *command: str) -> str:
    """What a program prints whose models come from the hub."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    environment |= {"XDG_CACHE_HOME": str(cache / "own"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, cwd=cache)
    if done.returncode not in (0, 1):  # 1: does not fit this machine
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def times(name: str, hub: Hub, cache: Path) -> list[str]:
    """Seconds of the dense model and of a run with each pruner, hours of the ten runs of the table; GiB of memory and disk."""
    seconds, peaks, dense = [], {"host": 0.0, "disk": 0.0}, float("inf")
    for pruner in PRUNERS:
        told = ask(hub, cache, "nnprune.run", f"model={name}", f"pruner={pruner}", "plan=true")
        stages = {key: float(value) for key, value in re.findall(r"^([a-z_]+) +([\d.]+)$", told, re.MULTILINE)}
        dense = min(dense, stages["dense_evaluation"])
        seconds.append(stages["total"] - stages["dense_evaluation"])
        for place, value in re.findall(r"(host|disk) ([\d.]+) GiB", told):
            peaks[place] = max(peaks[place], float(value))
    hours = (dense + 3 * sum(seconds)) / 3600
    return [f"{dense:.0f}", *(f"{one:.0f}" for one in seconds), f"{hours:.1f}", *(f"{peak:.1f}" for peak in peaks.values())]


def sizes(name: str, hub: Hub, cache: Path) -> list[str]:
    """GiB of memory and disk of a run of SparseGPT; of memory with layers on disk, where the checkpoint allows it."""
    found = []
    for runtime in ["auto"] if name.startswith("opt") else ["auto", "low_memory"]:
        told = ask(hub, cache, "benchmarks.sizes", f"model={name}", "pruner=sparsegpt", f"runtime={runtime}")
        found += re.findall(r"(?:host|disk) ([\d.]+) GiB", told)
    return [f"{float(value):.1f}" for value in found]


def main() -> None:
    only_sizes = sys.argv[1:2] == ["--sizes"]
    for name in sys.argv[1 + only_sizes :] or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            hub, cache = Hub(Path(folder) / "hub"), Path(folder) / "cache"
            cache.mkdir()
            make_hub(hub.root, name, SHAPES[name])
            print("| " + " | ".join([name, *(sizes if only_sizes else times)(name, hub, cache)]) + " |", flush=True)
            hub.close()


if __name__ == "__main__":
    main()
