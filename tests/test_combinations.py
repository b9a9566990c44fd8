"""Forty random combinations of settings on tiny models: each saved model is verified with plain transformers.

More of them: `NNPRUNE_COMBINATIONS=300 NNPRUNE_SEED=1 python -m pytest tests/test_combinations.py`.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_random
from support.combinations import SEQ_LEN, WINDOWS, draw, faults
from support.families import FAMILIES
from transformers import AutoModelForCausalLM

from nnprune.model import dtypes
from nnprune.run import run

COUNT = int(os.environ.get("NNPRUNE_COMBINATIONS", "40"))
FIRST = int(os.environ.get("NNPRUNE_SEED", "0")) * 1000


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """`checkpoints(family, dtype)`: a random model of the family as a directory, made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str, dtype: str) -> Path:
        folder = root / f"{family}-{dtype}"
        if not folder.exists():
            config = FAMILIES[family]().config
            config.vocab_size = 264
            save_random(config, folder)
            model = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.mul_(3)  # so that predictions differ
            shutil.rmtree(folder / "model.safetensors", ignore_errors=True)
            model.to(getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return get


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_saved_model_is_what_the_record_says(seed, checkpoints, small_text, tiny_config, monkeypatch):
    combination = draw(seed)
    monkeypatch.setattr(dtypes, "cpu_multiplies_bfloat16", lambda: combination.has_units)
    dense = checkpoints(combination.family, combination.stored)
    texts = [f"calibration.seq_len={SEQ_LEN}", f"evaluation.seq_len={SEQ_LEN}", f"evaluation.max_windows={WINDOWS}"]
    cfg = tiny_config(*texts, f"model.path={dense}", "save=true", "runtime.device=cpu", *combination.overrides)
    try:
        record = run(cfg)
    except ValueError as error:
        assert "were not given" in str(error), f"{combination}: {error}"  # no mixed N:M has the mean of these few layers
        return
    [saved] = Path(cfg.outputs).glob("*/*/*/model")
    assert not faults(record, dense, saved, small_text), combination
