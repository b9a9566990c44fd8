"""Writes a second model for the sweep: a small Llama with random weights and the demo's tokenizer. A real sweep names models of the hub."""

import sys
from importlib.resources import files

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(files("nnprune") / "data" / "demo")
torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape))
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
