"""Trains a saved pruned model a little further with its zeros kept, and saves it.

    nnprune pruner=wanda sparsity=2:4 save=true
    python examples/finetune_sparse.py outputs/demo/2of4/wanda-*/model --text train.txt --test test.txt -o tuned

Without --text and --test: the demo's own texts. Prints the perplexity before and after, and checks that no zero has changed.
"""

import argparse
import math
import time
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nnprune.model.masks import keep_zeros

DEMO = files("nnprune") / "data" / "demo"


def windows(path, tokenizer, seq_len):
    """The text of a file as token ids (windows, seq_len)."""
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    return ids[: ids.numel() // seq_len * seq_len].view(-1, seq_len)


@torch.no_grad()
def perplexity(model, rows):
    """exp of the mean negative log-likelihood over all predictions within the windows."""
    model.eval()
    return math.exp(sum(model(row[None], labels=row[None]).loss.item() for row in rows) / len(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="DIR", help="a model that save=true wrote")
    parser.add_argument("--text", type=Path, default=DEMO / "calibration.txt", help="text to train on")
    parser.add_argument("--test", type=Path, default=DEMO / "test.txt", help="text to measure")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("-o", "--output", type=Path, help="where to save the trained model")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    train, test = (windows(path, tokenizer, args.seq_len).to(device) for path in (args.text, args.test))
    test = test[:64]
    zeros = {name: weight == 0 for name, weight in model.named_parameters() if "layers" in name and weight.ndim == 2}
    print(f"before: perplexity {perplexity(model, test):.2f}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0)
    keep_zeros(model, optimizer)
    model.train()
    start = time.monotonic()
    for _ in range(args.steps):
        batch = train[torch.randint(len(train), (args.batch,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"after:  perplexity {perplexity(model, test):.2f} ({args.steps} steps, {time.monotonic() - start:.0f} s)")

    kept = all((model.get_parameter(name)[is_zero] == 0).all() for name, is_zero in zeros.items())
    print(f"zeros kept: {kept}")
    if args.output:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        print(f"model: {args.output}")


if __name__ == "__main__":
    main()
