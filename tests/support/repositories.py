"""Tiny repositories with the names and file layouts of the real ones, for the hub of the tests."""

import gzip
import json
from pathlib import Path

import pandas as pd
import torch
from conftest import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

TINY = {"vocab_size": 264, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
C4 = "en/c4-train.00000-of-01024.json.gz"


def make_repositories(root: Path) -> Path:
    """Write tiny repositories in the layouts of the real ones."""
    llama = root / "models/meta-llama/Llama/main"
    LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=32)).save_pretrained(llama, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(llama)
    (llama / "onnx").mkdir()
    for extra in ("consolidated.safetensors", "model_ema.safetensors", "onnx/model.safetensors", "llama.gguf"):
        (llama / extra).write_bytes(b"not to be fetched")
    opt = root / "models/facebook/opt/main"
    model = OPTForCausalLM(OPTConfig(**TINY, word_embed_proj_dim=16, ffn_dim=32))
    model.config.save_pretrained(opt)
    byte_tokenizer().save_pretrained(opt)
    torch.save(model.half().state_dict(), opt / "pytorch_model.bin")
    for extra in ("flax_model.msgpack", "tf_model.h5"):
        (opt / extra).write_bytes(b"not to be fetched")
    wikitext = root / "datasets/Salesforce/wikitext/main/wikitext-2-raw-v1"
    wikitext.mkdir(parents=True)
    for split in ("train", "test"):
        pd.DataFrame({"text": ["", f" = {split} = \n", " some text \n"]}).to_parquet(
            wikitext / f"{split}-00000-of-00001.parquet"
        )
    (root / "datasets/allenai/c4/main/en").mkdir(parents=True)
    with gzip.open(root / "datasets/allenai/c4/main" / C4, "wt") as file:
        file.write(json.dumps({"text": "a document", "url": "http://x.y"}) + "\n")
    return root
