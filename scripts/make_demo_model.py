"""Remakes the embedded demo in nnprune/data/demo: a small OPT, its tokenizer and its text. Seeded, on CPU, offline.

    python scripts/make_demo_model.py                      everything, about 30 minutes on two cores
    python scripts/make_demo_model.py --stages splits      only calibration.txt and test.txt

Stages, in this order:
    text       the training text (scripts/demo_text, stream SEEDS["train"]) into the work folder
    tokenizer  byte-level BPE on the first part of that text; it adds no special tokens by itself
    train      OPT from random weights for a fixed number of steps (the result does not depend on the clock), then bf16
    splits     calibration.txt and test.txt, from streams that training never saw
    measure    perplexity of the bf16 model on test.txt, windows of 512 tokens, every prediction counted

Letters: B batch, T tokens, V vocabulary.
"""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin at barriers crawl on busy cores

import torch
from demo_text import SEEDS, SEPARATOR, corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in OPT, whose texts begin and end with </s>
SEQ_LEN = 512
TOKENIZER_BYTES = 8_000_000
SPLIT_BYTES = 400_000
TEXT_FILES = {"calibration": "calibration.txt", "test": "test.txt"}


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def save_pretrained_atomically(thing, folder: Path) -> None:
    """`thing.save_pretrained` into a temporary folder, then file by file into `folder` by rename."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        thing.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            os.replace(path, folder / path.name)


def make_text(args: argparse.Namespace) -> None:
    start = time.time()
    write_atomically(args.work / "train.txt", corpus(SEEDS["train"], args.train_bytes))
    print(f"text: {args.train_bytes / 1e6:.1f} MB in {time.time() - start:.0f} s", flush=True)


def make_tokenizer(args: argparse.Namespace) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = (args.work / "train.txt").read_text(encoding="utf-8")[:TOKENIZER_BYTES]
    tokenizer.train_from_iterator(text.split(SEPARATOR), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=SEQ_LEN,
        clean_up_tokenization_spaces=False,
    )
    save_pretrained_atomically(fast, args.out)
    print(f"tokenizer: {len(fast)} tokens", flush=True)


def encode(tokenizer, text: str) -> torch.Tensor:
    """Token ids of the whole text. Each document carries the blank line before it, so that the pieces give the same
    ids as one long string would."""
    documents = text.split(SEPARATOR)
    pieces = documents[:1] + [SEPARATOR + document for document in documents[1:]]
    ids = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for piece in ids for token in piece])


def new_model(args: argparse.Namespace) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        word_embed_proj_dim=args.hidden_size,
        num_hidden_layers=args.num_layers,
        ffn_dim=4 * args.hidden_size,
        num_attention_heads=args.hidden_size // 32,
        max_position_embeddings=SEQ_LEN,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        do_layer_norm_before=True,
        tie_word_embeddings=True,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    return OPTForCausalLM(config)


def loss_of(model: OPTForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of every prediction, the softmax in fp32."""
    targets_BT = torch.cat([ids_BT[:, 1:], ids_BT.new_full((len(ids_BT), 1), -100)], dim=1)  # -100: nothing to predict
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over 4 % of the steps, then half a cosine down to 2 % of the peak."""
    warm_up = max(1, args.steps // 25)
    if step < warm_up:
        return args.lr * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, args.steps - warm_up)
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class MasterWeights:
    """AdamW on fp32 copies of a bf16 model's parameters: bf16 products are several times as fast as fp32 ones, but
    small updates would be lost in bf16 weights. Weight decay on matrices only: not on biases, norms and positions."""

    def __init__(self, model: OPTForCausalLM, lr: float, weight_decay: float) -> None:
        named = list(model.named_parameters())
        self.copies = [p.detach().float().requires_grad_() for _, p in named]
        model.to(torch.bfloat16)
        self.parameters = [p for _, p in named]
        decayed = [p.ndim == 2 and "positions" not in name for name, p in named]
        groups = [
            {
                "params": [p for p, chosen in zip(self.copies, decayed, strict=True) if chosen == group],
                "weight_decay": weight_decay if group else 0.0,
            }
            for group in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    def step(self, lr: float) -> None:
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            copy.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.copies, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            for copy, parameter in zip(self.copies, self.parameters, strict=True):
                parameter.copy_(copy)


def train(args: argparse.Namespace) -> None:
    """One pass over shuffled windows of the training text (again in another order if the steps need more)."""
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    ids = encode(tokenizer, (args.work / "train.txt").read_text(encoding="utf-8"))
    windows = ids[: ids.numel() // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    needed = args.steps * args.batch_size
    order = torch.cat([torch.randperm(len(windows)) for _ in range(math.ceil(needed / len(windows)))])
    model = new_model(args).train()
    master = MasterWeights(model, args.lr, args.weight_decay)
    print(
        f"train: {ids.numel()} tokens, {needed / len(windows):.2f} passes, "
        f"{sum(p.numel() for p in model.parameters())} parameters, {args.steps} steps",
        flush=True,
    )
    start, losses = time.time(), []
    for step in range(args.steps):
        batch_BT = windows[order[step * args.batch_size : (step + 1) * args.batch_size]]
        loss = loss_of(model, batch_BT)
        loss.backward()
        master.step(learning_rate(step, args))
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            spent = time.time() - start
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(
                f"step {step + 1}/{args.steps}  loss {mean:.3f}  perplexity {math.exp(mean):.2f}  "
                f"{spent / 60:.1f} min, {spent / (step + 1) * (args.steps - step - 1) / 60:.1f} min left",
                flush=True,
            )
    save_pretrained_atomically(model.eval(), args.out)
    print(f"model: {(args.out / 'model.safetensors').stat().st_size} bytes", flush=True)


def make_splits(args: argparse.Namespace) -> None:
    for split, name in TEXT_FILES.items():
        write_atomically(args.out / name, corpus(SEEDS[split], SPLIT_BYTES))
        print(f"splits: {name}, {(args.out / name).stat().st_size} bytes", flush=True)


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """Non-overlapping windows; the incomplete last one is left out."""
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).eval()
    ids = encode(tokenizer, (args.out / "test.txt").read_text(encoding="utf-8"))
    windows = ids[: ids.numel() // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    total = 0.0
    for batch_BT in windows.split(8):
        logits_BTV = model(input_ids=batch_BT, use_cache=False).logits.float()
        total += cross_entropy(logits_BTV[:, :-1].flatten(0, 1), batch_BT[:, 1:].flatten(), reduction="sum").item()
    perplexity = math.exp(total / (windows.numel() - len(windows)))
    print(
        json.dumps(
            {
                "test_tokens": windows.numel(),
                "perplexity": round(perplexity, 3),
                "uniform": len(tokenizer),
                "ratio": round(len(tokenizer) / perplexity, 1),
            }
        ),
        flush=True,
    )


STAGES = {"text": make_text, "tokenizer": make_tokenizer, "train": train, "splits": make_splits, "measure": measure}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("nnprune/data/demo"), help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("outputs/demo"), help="training text; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the windows")
    parser.add_argument("--steps", type=int, default=3600, help="optimiser steps; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of 512 tokens a step; default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate; default: %(default)s")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--train-bytes", type=int, default=29_000_000, help="of training text; default: %(default)s")
    parser.add_argument("--vocab-size", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=192, help="a multiple of 32; default: %(default)s")
    parser.add_argument("--num-layers", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="changes the order of sums, so the last digits")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    for name, stage in STAGES.items():
        if name in args.stages:
            stage(args)


if __name__ == "__main__":
    main()
