"""What nnprune does with a CUDA device, in one command of a few minutes and without network.

    python benchmarks/device.py --json device.json
    python benchmarks/device.py --device cpu --shape tiny       a rehearsal

Models and calibration tokens are random, which changes none of the work. In order of importance: kernels against plain PyTorch;
a few decoder layers beside other programs; the same layers with other methods and settings; all layers; little device memory.
A part that would exceed the budget is left out, and the JSON file is written anew after every part.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages of this checkout, installed or not

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks import programs
from benchmarks.device_kernels import TOLERANCE, check_kernels
from benchmarks.flops import LayerShapes, layer_shapes, useful_flops
from benchmarks.machine import description, disk_seconds, matrix_rates
from benchmarks.memory.make_random_checkpoint import PRESETS, make_checkpoint, make_config
from benchmarks.peers.common import Spec
from benchmarks.peers.nnprune import config
from benchmarks.report import device_report
from nnprune.calibration import RandomCalibration, token_hash
from nnprune.run import run


@dataclass(frozen=True)
class Shape:
    """A model of the preset llama-3-8b with other sizes, its depths, and how long parts take relative to that model's."""

    sizes: dict[str, int]
    few: int
    all: int
    num_samples: int
    seq_len: int
    time: float = 1


SHAPES = {
    "llama-3-8b": Shape({"vocab": 4096}, few=4, all=32, num_samples=128, seq_len=2048),
    "tiny": Shape(
        {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 160, "vocab": 4096}, few=2, all=3, num_samples=4, seq_len=64, time=0.1
    ),
}
LOW_MEMORY = ("runtime.layers=disk", "runtime.activations=disk")
RUNS: dict[str, tuple[str, str, tuple[str, ...], float]] = {  # row -> method, pattern, settings, seconds expected
    "wanda 2:4": ("wanda", "2:4", (), 8),
    "sparsegpt 2:4": ("sparsegpt", "2:4", (), 12),
    "sparsegpt 0.5": ("sparsegpt", "0.5", (), 12),
    "alps 2:4": ("alps", "2:4", (), 12),
    "sparsegpt_refit 2:4": ("sparsegpt_refit", "2:4", (), 12),
    "best_medium 2:4": ("best_medium", "2:4", (), 45),
    "best_fast 2:4": ("best_fast", "2:4", (), 15),
    "sparsegpt 2:4, low_memory": ("sparsegpt", "2:4", LOW_MEMORY, 12),
    "sparsegpt 2:4, sequential": ("sparsegpt", "2:4", ("propagate=sequential",), 10),
    "sparsegpt 2:4, activations=host": ("sparsegpt", "2:4", ("runtime.activations=host",), 10),
    "sparsegpt 2:4, layers=device": ("sparsegpt", "2:4", ("runtime.layers=device",), 10),
    "best 2:4": ("best", "2:4", (), 150),
}
ASKED = 6
"""The first rows of RUNS: those that goals compare."""

WHOLE = {"sparsegpt 2:4": 60, "wanda 2:4": 40, "alps 2:4": 80, "sparsegpt 2:4, saved": 120}
"""Rows with all layers -> seconds expected."""

LIMITS = ((12, "sparsegpt 2:4"), (12, "alps 2:4"), (16, "best_medium 2:4"), (8, "sparsegpt 2:4, low_memory"), (8, "wanda 2:4"))
"""GiB of the device, row of RUNS; first those that goals ask for."""


class Bench:
    """Runs parts within a budget of seconds, and keeps what they measured in a JSON file."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work, self.shape = args, work, SHAPES[args.shape]
        self.start = time.perf_counter()
        self.parts: dict[str, dict[str, dict[str, Any]]] = {}
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def checkpoint(self, num_layers: int) -> Path:
        """A random model of that depth, made once."""
        target = self.work / f"model-{num_layers}"
        if not target.exists():
            make_checkpoint(
                make_config(PRESETS["llama-3-8b"], {**self.shape.sizes, "layers": num_layers}), target, 0, 5 * 10**9
            )
        return target

    @cached_property
    def spec(self) -> Spec:
        """SparseGPT to 2:4 of the few layers; the token ids are in a file for the other programs."""
        size = {"num_samples": self.shape.num_samples, "seq_len": self.shape.seq_len}
        ids = RandomCalibration(**size, seed=0).token_ids(None, self.shape.sizes["vocab"])
        torch.save(ids, self.work / "ids.pt")
        model, file, hashed = str(self.checkpoint(self.shape.few)), str(self.work / "ids.pt"), token_hash(ids)
        calibration, device, scratch = {"path": None, **size}, self.args.device, str(self.work / "runs")
        return Spec(model, file, hashed, calibration, "sparsegpt", "2:4", "bfloat16", device, 0, None, scratch)

    @cached_property
    def layer(self) -> LayerShapes:
        """The shapes of a decoder layer."""
        sizes = {**self.shape.sizes, "layers": 1}
        with torch.device(self.args.device):
            model = AutoModelForCausalLM.from_config(make_config(PRESETS["llama-3-8b"], sizes), dtype=torch.bfloat16)
        return layer_shapes(model)[0]

    @cached_property
    def rates(self) -> dict[str, float]:
        """FLOP/s of products, measured."""
        largest = max(self.layer.linears, key=lambda shape: shape[0] * shape[1])
        return matrix_rates(min(8192, self.shape.num_samples * self.shape.seq_len), largest, torch.bfloat16, self.args.device)

    def part(self, section: str, row: str, seconds: float, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one part, expected to take `seconds` with the large model, unless it is not asked for or there is no time for it."""
        if section not in self.args.parts:
            return
        name, left, begun = f"{section}: {row}", self.left(), time.perf_counter()
        if seconds * self.shape.time > left:
            self.skipped[name] = f"needs about {seconds * self.shape.time:.0f} s, and {left:.0f} s are left"
        else:
            try:
                self.parts.setdefault(section, {})[row] = measure()
            except Exception as error:  # the other parts are independent of it
                self.failed[name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        said = self.skipped.get(name) or self.failed.get(name) or f"{time.perf_counter() - begun:.1f} s"
        print(f"{name}: {said}", file=sys.stderr, flush=True)
        self.write()

    def left(self) -> float:
        """Seconds of the budget."""
        return self.args.budget - (time.perf_counter() - self.start)

    def write(self) -> None:
        """Write all that is known."""
        everything = {
            "settings": {**vars(self.args), "json": str(self.args.json)},
            "shape": asdict(self.shape),
            "machine": description(self.args.device, None),
            "matrix_flops_per_second": self.rates,
            "seconds": time.perf_counter() - self.start,
            **{key: getattr(self, key) for key in ("parts", "skipped", "failed")},
        }
        unfinished = self.args.json.with_suffix(".tmp")
        unfinished.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.args.json)

    def program(self, program: programs.Program) -> dict[str, Any]:
        """The few layers by one of the compared programs, in a process of its own."""
        gc.collect()
        torch.cuda.empty_cache()  # the other process needs what this one has no more use for
        result, seconds = program.run(self.spec, "compared", timeout=max(self.left(), 1))
        return {**asdict(result), "process_seconds": seconds}

    def prune(self, row: str, num_layers: int, more: tuple[str, ...] = ()) -> dict[str, Any]:
        """A row of RUNS, with `more` settings, in this process: seconds by stage, device memory, and FLOP/s of forwards with statistics
        and of the solver."""
        method, pattern, settings, _ = RUNS[row]
        model, options = str(self.checkpoint(num_layers)), {"overrides": [*settings, *more]}
        try:
            record = run(config(replace(self.spec, model=model, method=method, pattern=pattern, options=options)))
        finally:
            shutil.rmtree(self.spec.scratch, ignore_errors=True)  # finished layers are as large as the model
        kind = method if method == "wanda" else "sparsegpt"
        flops = useful_flops([self.layer] * num_layers, kind, self.shape.num_samples, self.shape.seq_len)
        rates = {"calibration": (flops["forwards"] + flops["statistics"]) / record.seconds["calibration"]}
        if method == "sparsegpt":
            rates["prune"] = flops["solver"] / record.seconds["prune"]
        kept = {key: getattr(record, key) for key in ("seconds", "peak_device_bytes", "commit", "notes")}
        return {**kept, "flops_per_second": rates}

    def limited(self, gibibytes: int, row: str) -> dict[str, Any]:
        """A row of RUNS with so much memory of the CUDA device. Failing for lack of memory is a result."""
        limit = (f"runtime.device_memory={gibibytes}GiB",) if self.args.device == "cuda" else ()
        try:
            return self.prune(row, self.shape.few, limit)
        except (torch.OutOfMemoryError, ValueError) as error:
            return {"error": str(error).split("\n")[0]}

    def saved(self) -> dict[str, Any]:
        """The whole model pruned and saved, and the seconds that the disk takes for as many bytes."""
        found = self.prune("sparsegpt 2:4", self.shape.all, ("save=true",))
        num_bytes = sum(part.stat().st_size for part in self.checkpoint(self.shape.all).iterdir())
        return {**found, "disk_seconds": disk_seconds(self.work, num_bytes)}

    def measure(self) -> None:
        """All parts in order of importance."""
        shape, compared = self.shape, (("nnprune", programs.nnprune([]), 25), ("official", programs.official(), 60))
        llmcompressor = programs.llmcompressor(self.args.llmcompressor_python)
        if llmcompressor.missing:
            self.skipped[f"compare: {llmcompressor.name}"] = llmcompressor.missing
        self.part("kernels", "all", 15, lambda: dict(check_kernels(self.spec)))
        for name, program, seconds in compared:
            self.part("compare", name, seconds, partial(self.program, program))
        rows = list(RUNS)
        for row in rows[:ASKED]:
            self.part("settings", row, RUNS[row][3], partial(self.prune, row, shape.few))
        *plain, saved = WHOLE
        for row in plain:
            self.part("whole", row, WHOLE[row], partial(self.prune, row, shape.all))
        for gibibytes, row in LIMITS:
            self.part("memory", f"{gibibytes} GiB, {row}", RUNS[row][3], partial(self.limited, gibibytes, row))
        self.part("whole", saved, WHOLE[saved], self.saved)
        for row in rows[ASKED:]:
            self.part("settings", row, RUNS[row][3], partial(self.prune, row, shape.few))
        if not llmcompressor.missing:
            self.part("compare", llmcompressor.name, 100, partial(self.program, llmcompressor))


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, parts = parser.add_argument, ("kernels", "compare", "settings", "whole", "memory")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--shape", choices=SHAPES, default="llama-3-8b")
    add("--budget", type=float, default=450, metavar="SECONDS")
    add("--parts", type=lambda text: text.split(","), default=list(parts), help=f"of {','.join(parts)}")
    add("--llmcompressor-python", metavar="PATH", help="an interpreter that has llmcompressor; default: this one")
    add("--json", type=Path, default=Path("device.json"), metavar="FILE", help="all that was measured (default: %(default)s)")
    args = parser.parse_args(arguments)
    if unknown := sorted(set(args.parts) - set(parts)):
        parser.error(f"--parts: there is no {unknown[0]}; there are {', '.join(parts)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds none; --device cpu --shape tiny rehearses")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line says. Returns 1 when a part failed, or a kernel differs from PyTorch."""
    args = parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args, Path(work))
        bench.measure()
    print(device_report(json.loads(args.json.read_text(encoding="utf-8"))))
    checks = bench.parts.get("kernels", {}).get("all", {})
    return int(
        bool(bench.failed) or any(found["error"] > TOLERANCE or found.get("same", 1) < 0.99 for found in checks.values())
    )


if __name__ == "__main__":
    sys.exit(main())
