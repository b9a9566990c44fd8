"""Loads a saved model with transformers alone, counts its zeros and lets it write."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])

weights = [module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name]
most = max(int(weight.unflatten(1, (-1, 4)).count_nonzero(dim=-1).max()) for weight in weights)
print(f"{len(weights)} linears, at most {most} nonzeros in 4 weights")

prompt = tokenizer("When it is thick and smooth,", return_tensors="pt")
written = model.generate(**prompt, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(written[0]))
