"""The tables of `experiment=opt_table` and `llama_table` on a hub of tiny models: one command, killed and started again."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from conftest import HANGS, ROOT, byte_tokenizer
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig, Qwen3Config

from nnprune.run import CONF
from support.fakehub import Hub
from support.repositories import C4, TINY

BRIEF = ("calibration.num_samples=2", "calibration.seq_len=16", "evaluation.seq_len=16", "runtime.threads=1")


def models_of(experiment: str) -> list[str]:
    return str(OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml").hydra.sweeper.params.model).split(",")


def make_tables_hub(root: Path, models: Sequence[str]) -> Path:
    """Write tiny models, all different, under the names of the real ones, and small texts."""
    for seed, name in enumerate(models):
        torch.manual_seed(seed)
        folder = root / "models" / OmegaConf.load(CONF / "model" / f"{name}.yaml").path / "main"
        model = AutoModelForCausalLM.from_config(_tiny(name))
        if name.startswith("opt"):  # as the real ones, which have no safetensors
            model.config.save_pretrained(folder)
            torch.save(model.half().state_dict(), folder / "pytorch_model.bin")
        else:
            model.bfloat16().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    wikitext = root / "datasets/Salesforce/wikitext/main/wikitext-2-raw-v1/test-00000-of-00001.parquet"
    wikitext.parent.mkdir(parents=True)
    pd.DataFrame({"text": [f" Line {i} of a text to measure. \n" for i in range(6)]}).to_parquet(wikitext)
    c4 = root / "datasets/allenai/c4/main" / C4
    c4.parent.mkdir(parents=True)
    with gzip.open(c4, "wt") as file:
        file.writelines(json.dumps({"text": f"Document {i} is longer than a window of calibration."}) + "\n" for i in range(9))
    return root


def _tiny(name: str) -> PreTrainedConfig:
    if name.startswith("opt"):
        return OPTConfig(**TINY, word_embed_proj_dim=16, ffn_dim=32, init_std=0.2, dtype="float16")
    kind = Qwen3Config if name.startswith("qwen") else LlamaConfig
    return kind(**TINY, intermediate_size=32, num_key_value_heads=1, head_dim=8, initializer_range=0.2, dtype="bfloat16")


def run_table(hub: Hub, folder: Path, *settings: str, kill_after: int | None = None) -> subprocess.CompletedProcess:
    """The command in `folder`, with its records in outputs/ there; killed without notice once there are that many records."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment = {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "cache"),
        "XDG_CACHE_HOME": str(folder / "cache/own"),
    }
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "nnprune.run", *settings, *BRIEF]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + HANGS
        while process.poll() is None and time.monotonic() < end:
            if kill_after is not None and len(record_paths(folder)) >= kill_after:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        process.kill()
        process.wait()
        log.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, log.read())


def record_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("outputs/*/*/*/result.json"))
