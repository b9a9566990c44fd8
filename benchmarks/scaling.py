"""How nnprune's pruning time grows with the calibration tokens and with the decoder layers: both should be straight lines.

    python benchmarks/scaling.py --tokens 8192,16384,32768,65536 --layers 4,8,16

The models are random OPTs made on the fly, the tokens are random too: neither changes the work. Rounds are interleaved, so
that a machine that slows down meanwhile slows every point alike.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import correlation, linear_regression, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages of this checkout, installed or not

import torch
from transformers import AutoModelForCausalLM, OPTConfig
from transformers.utils import logging as transformers_logging

from benchmarks import programs
from benchmarks.machine import description
from benchmarks.peers.common import Spec
from benchmarks.report import markdown
from nnprune.calibration import RandomCalibration, token_hash
from nnprune.model.loading import DTYPES
from nnprune.texts import DEMO_FOLDER

VOCAB_SIZE = 4096
"""That of the demo's tokenizer, which every model here borrows: nnprune wants one beside the weights."""


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument

    def counts(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    add("--tokens", type=counts, default=[8192, 16384, 32768, 65536], help="multiples of --seq-len; at least two")
    add("--layers", type=counts, default=[4, 8, 16], help="at least two")
    add("--fixed-layers", type=int, default=4, help="layers of the model that meets all numbers of tokens")
    add("--fixed-tokens", type=int, default=8192, help="tokens that the models of all depths meet")
    add("--hidden", type=int, default=512)
    add("--seq-len", type=int, default=512)
    add("--method", choices=("sparsegpt", "wanda"), default="sparsegpt")
    add("--pattern", default="2:4")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads; default: nnprune's own choice")
    add("--rounds", type=int, default=5)
    add("--json", type=Path, metavar="FILE", help="all that was measured")
    args = parser.parse_args(arguments)
    if min(len(set(args.tokens)), len(set(args.layers))) < 2:
        parser.error("--tokens and --layers: a line needs at least two different points")
    if any(tokens % args.seq_len or not tokens for tokens in [*args.tokens, args.fixed_tokens]):
        parser.error(f"--tokens and --fixed-tokens: must be multiples of --seq-len={args.seq_len}")
    return args


def make_model(num_layers: int, args: argparse.Namespace, work: Path) -> Path:
    """A random OPT of that many layers, with the demo's tokenizer, in a folder of its own."""
    folder = work / f"opt-{num_layers}"
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.hidden,
        word_embed_proj_dim=args.hidden,
        ffn_dim=4 * args.hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=max(args.hidden // 64, 1),
        max_position_embeddings=args.seq_len,
    )
    AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype]).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_FOLDER / name, folder)
    return folder


def make_spec(model: Path, num_tokens: int, args: argparse.Namespace, work: Path) -> Spec:
    """The run of one point."""
    size = {"num_samples": num_tokens // args.seq_len, "seq_len": args.seq_len}
    ids = RandomCalibration(**size, seed=0).token_ids(None, VOCAB_SIZE)
    return Spec(
        model=str(model),
        ids="",  # nnprune draws its own, and tells their hash
        ids_hash=token_hash(ids),
        calibration={"path": None, **size},
        method=args.method,
        pattern=args.pattern,
        dtype=args.dtype,
        device=args.device,
        seed=0,
        threads=args.threads,
        scratch=str(work),
    )


def measure(points: dict[tuple[int, int], Spec], rounds: int) -> dict[tuple[int, int], list[float]]:
    """Seconds of nnprune's pruning in every round, by (layers, tokens)."""
    program = programs.nnprune([])
    seconds: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    for number in range(rounds):
        for (num_layers, num_tokens), spec in points.items():
            result, _ = program.run(spec, f"{num_layers}-{num_tokens}-{number}")
            seconds[num_layers, num_tokens].append(result.seconds["prune"])
            print(f"{num_layers} layers, {num_tokens} tokens: {result.seconds['prune']:.2f} s", file=sys.stderr, flush=True)
    return seconds


def line(seconds: dict[int, list[float]]) -> dict[str, float]:
    """The straight line through the medians: seconds a unit, seconds at zero, R^2."""
    medians = [median(rounds) for rounds in seconds.values()]
    slope, intercept = linear_regression(list(seconds), medians)
    return {"slope": slope, "intercept": intercept, "r_squared": correlation(list(seconds), medians) ** 2}


def section(title: str, unit: str, seconds: dict[int, list[float]]) -> str:
    """The table of one series of points, and its line."""
    fit = line(seconds)
    rows = [
        [
            str(count),
            f"{median(rounds):.2f} [{min(rounds):.2f} - {max(rounds):.2f}]",
            f"{fit['intercept'] + fit['slope'] * count:.2f}",
        ]
        for count, rounds in seconds.items()
    ]
    table = markdown([unit, "prune s: median [min - max]", "line"], rows)
    fitted = f"{fit['intercept']:.3g} s + {fit['slope']:.3g} s x {unit}, R^2 = {fit['r_squared']:.4f}"
    return f"{title}\n\n{table}\n\n{fitted}"


def main() -> None:
    """Run what the command line says."""
    args = parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        wanted = {(args.fixed_layers, tokens) for tokens in args.tokens} | {(n, args.fixed_tokens) for n in args.layers}
        models = {num_layers: make_model(num_layers, args, work) for num_layers in {n for n, _ in wanted}}
        specs = {point: make_spec(models[point[0]], point[1], args, work) for point in sorted(wanted)}
        seconds = measure(specs, args.rounds)
    by_tokens = {tokens: seconds[args.fixed_layers, tokens] for tokens in sorted(set(args.tokens))}
    by_layers = {num_layers: seconds[num_layers, args.fixed_tokens] for num_layers in sorted(set(args.layers))}
    machine = description(args.device, args.threads)
    print(f"random OPT of width {args.hidden}, {args.method}, {args.pattern}, sequences of {args.seq_len}, {args.dtype}")
    print(f"{machine['device']}, {machine['threads']} threads; rounds: {args.rounds}\n")
    print(section(f"Calibration tokens ({args.fixed_layers} layers):", "tokens", by_tokens))
    print("\n" + section(f"Decoder layers ({args.fixed_tokens} tokens):", "layers", by_layers))
    if args.json:
        everything = {
            "settings": {**vars(args), "json": str(args.json)},
            "machine": machine,
            "tokens": {"prune_seconds": by_tokens, **line(by_tokens)},
            "layers": {"prune_seconds": by_layers, **line(by_layers)},
        }
        args.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
