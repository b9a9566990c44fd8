"""Shows that host memory does not grow with depth: the peaks of `runtime=low_memory` for a shallow and a deep model.

    python benchmarks/memory/depth.py
    python benchmarks/memory/depth.py --hidden 512 --ffn 2048 --heads 8 --layers 6 24 --pruners wanda

Makes a random OPT checkpoint of each depth, prunes it to 2:4 with each method in a process of its own, dense and pruned
evaluation and saving included, and compares the largest with the smallest depth. Exit status 1 when a peak grows by more
than 5 %.

Peaks: `host` is `peak_host_bytes` of the run's record, `resident` the largest VmHWM of the process since it began, and
`anonymous` its largest RssAnon + RssShmem, read 20 times a second. The first two count mapped files too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages of this checkout

from benchmarks.memory.memory_limit import run_limited

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"hidden": 1024, "ffn": 4096, "heads": 16, "vocab": 4096}
TOLERANCE = 1.05
PEAKS = ("host", "resident", "anonymous")


@dataclass
class Measurement:
    """One run: peaks in bytes by name, of PEAKS."""

    pruner: str
    num_layers: int
    checkpoint_bytes: int
    peaks: dict[str, int]
    seconds: float


def environment() -> dict[str, str]:
    """Ours, with this checkout's package before any installed one."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


def make_checkpoint(folder: Path, args: argparse.Namespace, num_layers: int) -> None:
    shape = {"layers": num_layers, "positions": max(args.seq_len, 512), **{key: vars(args)[key] for key in SHAPE}}
    options = [f"--{key}={value}" for key, value in shape.items()]
    script = Path(__file__).with_name("make_random_checkpoint.py")
    subprocess.run([sys.executable, str(script), str(folder), "--preset=opt-1.3b", *options], check=True, stdout=sys.stderr)


def measure(checkpoint: Path, outputs: Path, pruner: str, args: argparse.Namespace, num_layers: int) -> Measurement:
    """Prune `checkpoint` in a process of its own. Raises RuntimeError when that fails."""
    command = [sys.executable, "-m", "nnprune.run", "model=local", f"model.path={checkpoint}", f"pruner={pruner}"]
    command += ["sparsity=2:4", "runtime=low_memory", "save=true", f"outputs={outputs}", "calibration=random"]
    command += [f"calibration.num_samples={args.num_samples}", f"calibration.seq_len={args.seq_len}", "evaluation=demo"]
    command += [f"evaluation.max_windows={args.num_samples}", f"evaluation.seq_len={args.seq_len}"]
    report = run_limited(command, None, "none", env=environment(), stdout=sys.stderr)
    if report.exit_status:
        raise RuntimeError(f"{pruner}, {num_layers} layers: exit status {report.exit_status}")
    [path] = outputs.glob(f"*/2of4/{pruner}-*/result.json")
    host = json.loads(path.read_text(encoding="utf-8"))["peak_host_bytes"]
    peaks = dict(zip(PEAKS, (host, report.peak_resident_bytes, report.peak_anon_bytes), strict=True))
    num_bytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return Measurement(pruner, num_layers, num_bytes, peaks, report.seconds)


def print_table(measurements: list[Measurement]) -> None:
    mib = 1024**2
    print("| pruner | layers | checkpoint | " + " | ".join(PEAKS) + " | seconds |\n| :--- " + "| ---: " * 6 + "|")
    for m in measurements:
        peaks = " | ".join(f"{m.peaks[name] / mib:.0f} MiB" for name in PEAKS)
        print(f"| {m.pruner} | {m.num_layers} | {m.checkpoint_bytes / mib:.0f} MiB | {peaks} | {m.seconds:.0f} |")


def growth(measurements: list[Measurement]) -> dict[str, float]:
    """Peak -> that of the deepest model over that of the shallowest, for the runs of one pruner."""
    ordered = sorted(measurements, key=lambda m: m.num_layers)
    return {name: ordered[-1].peaks[name] / ordered[0].peaks[name] for name in PEAKS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in SHAPE.items():
        parser.add_argument(f"--{key}", type=int, default=value, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48], help="(default: 12 48)")
    parser.add_argument("--pruners", nargs="+", default=["wanda", "sparsegpt"], help="(default: wanda sparsegpt)")
    parser.add_argument("--num-samples", type=int, default=4, help="calibration and evaluation (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where checkpoints and runs go for a while (default: the system's)")
    args = parser.parse_args()
    measurements: list[Measurement] = []
    for num_layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="depth-") as scratch:
            checkpoint = Path(scratch) / "checkpoint"
            make_checkpoint(checkpoint, args, num_layers)
            for pruner in args.pruners:
                measurements.append(measure(checkpoint, Path(scratch) / pruner, pruner, args, num_layers))
    print_table(measurements)
    grown = False
    for pruner in args.pruners:
        ratios = growth([m for m in measurements if m.pruner == pruner])
        grown |= max(ratios.values()) > TOLERANCE
        told = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        print(f"{pruner}: {max(args.layers)} over {min(args.layers)} layers: {told}")
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    main()
