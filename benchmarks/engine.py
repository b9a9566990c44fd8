"""nnprune beside other programs: the same model, token ids, method and pattern, in turn.

    python benchmarks/engine.py --model DIR --calibration FILE.txt --evaluation FILE.txt --method sparsegpt --pattern 2:4

Rounds are paired: every program once, each in a process of its own, then all of them again. The first round of each leaves
its pruned model, whose perplexity one plain evaluator measures outside of all that is timed. benchmarks/README.md says what
each program does and what the columns mean.

Letters: N samples, T tokens.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages of this checkout, installed or not

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks import programs
from benchmarks.flops import LayerShapes, layer_shapes, useful_flops
from benchmarks.machine import description, matrix_rates
from benchmarks.peers.common import Spec
from benchmarks.programs import Program, ProgramFailed
from benchmarks.quality import linear_sparsity, perplexity
from benchmarks.report import Measurements, report
from nnprune.calibration import TextCalibration, token_hash
from nnprune.evaluation import Evaluation
from nnprune.model.loading import DTYPES, ModelSource
from nnprune.patterns import parse_pattern

PEERS = ("nnprune", "official", "llmcompressor", "nn-pruning")
GEMM_TOKENS = 8192
"""Most tokens in the product that stands for the model's."""


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a directory made by save_pretrained, or demo")
    add("--calibration", required=True, help="a text file; demo:calibration.txt is the demo's")
    add("--evaluation", required=True, help="a text file; demo:test.txt is the demo's")
    add("--method", choices=("sparsegpt", "wanda"), default="sparsegpt")
    add("--pattern", default="2:4", help="2:4, 4:8, or a fraction of zeros such as 0.5")
    add("--num-samples", type=int, default=32)
    add("--seq-len", type=int, default=1024)
    add("--eval-seq-len", type=int, help="tokens of a window of the evaluation; default: --seq-len")
    add("--max-windows", type=int, default=32, help="windows of the evaluation")
    add("--peers", type=lambda text: text.split(","), default=list(PEERS), help=f"of {','.join(PEERS)}")
    add("--rounds", type=int, default=5)
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: the checkpoint's")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads; default: each program's own choice")
    add("--seed", type=int, default=0)
    add("--nnprune", action="append", default=[], metavar="KEY=VALUE", help="a further setting of nnprune; may be repeated")
    add("--llmcompressor-python", metavar="PATH", help="an interpreter that has llmcompressor; default: this one")
    add("--nn-pruning", metavar="PATH", help="a checkout of the nn-pruning toolkit")
    add("--profile", action="store_true", help="on the CPU: one more run of each, under torch.profiler")
    add("--json", type=Path, metavar="FILE", help="all that was measured")
    add("--work", type=Path, metavar="DIR", help="keep specs, logs, results and pruned models there; default: nothing is kept")
    args = parser.parse_args(arguments)
    if unknown := sorted(set(args.peers) - set(PEERS)):
        parser.error(f"--peers: there is no {unknown[0]}; there are {', '.join(PEERS)}")
    if args.rounds < 1:
        parser.error(f"--rounds={args.rounds}: must be at least 1")
    if args.profile and args.device != "cpu":
        parser.error("--profile: shares of matrix products are measured with --device cpu only")
    try:
        parse_pattern(args.pattern)
    except ValueError as error:
        parser.error(f"--pattern: {error}")
    return args


def find_programs(args: argparse.Namespace, model: str) -> list[Program]:
    """The programs asked for, in order, each knowing whether it can run."""
    make = {
        "nnprune": lambda: programs.nnprune(args.nnprune),
        "official": programs.official,
        "llmcompressor": lambda: programs.llmcompressor(args.llmcompressor_python),
        "nn-pruning": lambda: programs.nn_pruning(args.nn_pruning, model),
    }
    return [make[name]() for name in args.peers]


def make_spec(args: argparse.Namespace, source: ModelSource, work: Path) -> tuple[Spec, Tensor]:
    """What all programs are told, with the calibration ids in a file, and the evaluation ids (N, T)."""
    tokenizer, config = source.tokenizer(), source.config()
    path = args.calibration if args.calibration.startswith("demo:") else str(Path(args.calibration).resolve())
    calibration = {"path": path, "num_samples": args.num_samples, "seq_len": args.seq_len}
    ids = TextCalibration(seed=args.seed, **calibration).token_ids(tokenizer, config.get_text_config().vocab_size)
    torch.save(ids, work / "calibration.pt")
    evaluation = Evaluation({}, args.eval_seq_len or args.seq_len, args.max_windows, args.evaluation)
    dtype = args.dtype if args.dtype != "auto" else str(config.dtype or torch.float32).removeprefix("torch.")
    spec = Spec(
        model=str(source.directory.resolve()),
        ids=str(work / "calibration.pt"),
        ids_hash=token_hash(ids),
        calibration=calibration,
        method=args.method,
        pattern=args.pattern,
        dtype=dtype,
        device=args.device,
        seed=args.seed,
        threads=args.threads,
        scratch=str(work),
    )
    return spec, evaluation.token_ids(tokenizer)["text"]


def measure_model(directory: str, spec: Spec, ids: Tensor) -> tuple[float, float, list[LayerShapes]]:
    """Perplexity on ids (N, T), fraction of zeros of its linears, and shapes of a model's layers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=spec.torch_dtype).eval().to(spec.device)
    return perplexity(model, ids), linear_sparsity(model), layer_shapes(model)


def run_round(program: Program, spec: Spec, runs: Measurements, ids: Tensor, keep_model: bool) -> None:
    """One more timed run; the first one also leaves its model to be measured with ids (N, T)."""
    number = len(runs.results) + 1
    save = Path(spec.scratch) / f"{program.name}-model"
    if number == 1:
        shutil.rmtree(save, ignore_errors=True)  # of an earlier benchmark
    result, seconds = program.run(replace(spec, save=str(save) if number == 1 else None), f"round{number}")
    runs.results.append(result)
    runs.process_seconds.append(seconds)
    if number == 1:
        runs.perplexity, runs.sparsity, _ = measure_model(result.pruned_model, spec, ids)
        if not keep_model:
            shutil.rmtree(save)
    print(f"{program.name} round {number}: pruned in {result.seconds['prune']:.2f} s", file=sys.stderr, flush=True)


def run_all(
    args: argparse.Namespace, runnable: list[Program], spec: Spec, ids: Tensor, failed: dict[str, str]
) -> dict[str, Measurements]:
    """All rounds of all programs, in turn; one that fails is left out from then on, with the reason in `failed`."""
    measured = {program.name: Measurements() for program in runnable}
    for step in [*range(args.rounds), *(["profile"] if args.profile else [])]:
        for program in runnable:
            if program.name in failed:
                continue
            try:
                if step == "profile":
                    measured[program.name].profile = program.run(replace(spec, profile=True), "profile")[0].profile
                else:
                    run_round(program, spec, measured[program.name], ids, keep_model=args.work is not None)
            except ProgramFailed as error:
                failed[program.name] = str(error)
    return {name: runs for name, runs in measured.items() if runs.results}


def benchmark(args: argparse.Namespace, work: Path) -> bool:
    """Measure, print and write what the command line asks for; returns whether every program that began also finished."""
    source = ModelSource(args.model, dtype=args.dtype)
    if source.directory is None:
        raise ValueError(f"--model={args.model}: no such directory; all programs must find the model there")
    asked = find_programs(args, str(source.directory))
    skipped = {program.name: program.missing for program in asked if program.missing}
    failed: dict[str, str] = {}
    if args.threads:
        torch.set_num_threads(args.threads)
    spec, ids = make_spec(args, source, work)
    dense_perplexity, _, layers = measure_model(spec.model, spec, ids)
    largest = max((shape for layer in layers for shape in layer.linears), key=lambda shape: shape[0] * shape[1])
    rates = matrix_rates(min(args.num_samples * args.seq_len, GEMM_TOKENS), largest, spec.torch_dtype, args.device)
    flops = useful_flops(layers, args.method, args.num_samples, args.seq_len)
    measured = run_all(args, [program for program in asked if not program.missing], spec, ids, failed)
    machine = description(args.device, args.threads)
    print(f"{source.name}, {args.method}, {args.pattern}, {args.num_samples} x {args.seq_len} tokens, {spec.dtype}")
    print(f"{machine['device']}, {machine['threads']} threads; rounds: {args.rounds}")
    print(report(measured, flops, rates, dense_perplexity, skipped, failed))
    if args.json:
        everything = {
            "settings": {**vars(args), "json": str(args.json), "work": args.work and str(args.work)},
            "dtype": spec.dtype,
            "ids_hash": spec.ids_hash,
            "machine": machine,
            "matrix_flops_per_second": rates,
            "useful_flops": flops,
            "dense_perplexity": dense_perplexity,
            "programs": {name: runs.as_dict(sum(flops.values())) for name, runs in measured.items()},
            "skipped": skipped,
            "failed": failed,
        }
        args.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    return not failed


def main() -> None:
    """Run what the command line says. Exit status 1 when a program failed."""
    args = parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        try:
            finished = benchmark(args, work)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
    sys.exit(0 if finished else 1)


if __name__ == "__main__":
    main()
