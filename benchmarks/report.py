"""What was measured, as markdown. Formats only: every figure comes from a run."""

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.device_goals import goal_rows
from benchmarks.peers.common import Result

NOT_SHOWN = 0.005
"""Seconds below which a stage is left out of the table."""


@dataclass
class Measurements:
    """All runs of one program, and the quality of the model that its first one left.

    `process_seconds` are the lives of whole processes, imports and saving included.
    """

    results: list[Result] = field(default_factory=list)
    process_seconds: list[float] = field(default_factory=list)
    perplexity: float | None = None
    sparsity: float | None = None
    profile: dict[str, float] | None = None

    @property
    def prune_seconds(self) -> list[float]:
        """Of each round: from a model in memory to a pruned model in memory."""
        return [result.seconds["prune"] for result in self.results]

    @property
    def stages(self) -> dict[str, float]:
        """Median seconds of every other stage."""
        names = [name for name in self.results[0].seconds if name != "prune"]
        return {name: median(result.seconds[name] for result in self.results) for name in names}

    def as_dict(self, flops: float) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "prune_seconds_median": median(self.prune_seconds),
            "flops_per_second": flops / median(self.prune_seconds),
            "stage_seconds_median": self.stages,
            **asdict(self),
        }


def report(
    programs: dict[str, Measurements],
    flops: dict[str, float],
    rates: dict[str, float],
    dense_perplexity: float,
    skipped: dict[str, str],
    failed: dict[str, str],
) -> str:
    """All that a benchmark prints but its settings: operations by part, FLOP/s by product, and why programs are missing."""
    total = sum(flops.values())
    products = "; ".join(f"{size}: {rate / 1e9:.0f} GFLOP/s" for size, rate in rates.items())
    parts = ", ".join(f"{part} {value / 1e9:.0f}" for part, value in flops.items())
    sections = [f"matrix products: {products}\nuseful GFLOP: {total / 1e9:.0f} ({parts})"]
    sections.append(table(programs, total, max(rates.values()), dense_perplexity))
    if any(runs.profile for runs in programs.values()):
        sections.append(profile_table(programs))
    sections += [f"{name}: {runs.results[0].note}" for name, runs in programs.items() if runs.results[0].note]
    sections += [f"{name} skipped: {reason}" for name, reason in skipped.items()]
    sections += [f"{name} failed: {reason}" for name, reason in failed.items()]
    return "\n\n".join(sections)


def table(programs: dict[str, Measurements], flops: float, machine_rate: float, dense_perplexity: float) -> str:
    """One row a program. Ratios are of medians, to nnprune's; `flops` are those of one pruning, rates FLOP/s."""
    has_device = any(result.peak_device_bytes for runs in programs.values() for result in runs.results)
    head = ["program", "prune s: median [min - max]", "ratio", "other stages s", "peak host MB"]
    head += ["peak device MB"] if has_device else []
    head += ["useful GFLOP/s", "of machine", "zeros", "perplexity"]
    rows = [[*["dense"], *["--"] * (len(head) - 2), f"{dense_perplexity:.2f}"]]
    reference = median(programs["nnprune"].prune_seconds) if "nnprune" in programs else None
    for name, runs in programs.items():
        seconds = runs.prune_seconds
        middle = median(seconds)
        stages = ", ".join(f"{stage} {value:.2f}" for stage, value in runs.stages.items() if value >= NOT_SHOWN)
        row = [
            name,
            f"{middle:.2f} [{min(seconds):.2f} - {max(seconds):.2f}]",
            f"{middle / reference:.2f}" if reference else "--",
            stages,
            f"{median(result.peak_host_bytes for result in runs.results) / 1e6:.0f}",
        ]
        row += [f"{median(result.peak_device_bytes for result in runs.results) / 1e6:.0f}"] if has_device else []
        rate = flops / middle
        row += [f"{rate / 1e9:.1f}", f"{rate / machine_rate:.1%}", f"{runs.sparsity:.2%}", f"{runs.perplexity:.2f}"]
        rows.append(row)
    return markdown(head, rows)


def profile_table(programs: dict[str, Measurements]) -> str:
    """The share of the profiled stage that lies within matrix products and within factorisations."""
    rows = [
        [name, f"{runs.profile['products']:.1%}", f"{runs.profile['factorisations']:.1%}", f"{runs.profile['seconds']:.2f}"]
        for name, runs in programs.items()
        if runs.profile
    ]
    return markdown(["program", "matrix products", "factorisations", "prune s, profiled"], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table: text to the left in the first column, figures to the right."""
    lines = [head, [":---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def device_report(found: dict[str, Any]) -> str:
    """What device.py prints of its JSON file: a table for each kind of part that was measured, and what is missing."""
    parts, shape = found["parts"], found["shape"]
    card, rates = found["machine"]["device"], found["matrix_flops_per_second"]
    products = "; ".join(f"{size}: {rate / 1e12:.3g} TFLOP/s" for size, rate in rates.items())
    sections = [
        f"{card}; {shape['num_samples']} x {shape['seq_len']} tokens; matrix products: {products}; {found['seconds']:.0f} s"
    ]
    if checks := parts.get("kernels", {}).get("all"):
        rows = [[name, f"{row['error']:.1e}", f"{row.get('same', 1):.2%}"] for name, row in checks.items()]
        sections.append(markdown(["against PyTorch", "relative error", "same masks"], rows))
    if "compare" in parts:
        rows = [[name, *_stages(row["seconds"], "({})"), *_memory(row)] for name, row in parts["compare"].items()]
        rows = [[row[0], f"{parts['compare'][row[0]]['seconds']['prune']:.2f}", *row[1:]] for row in rows]
        sections.append(markdown([f"{shape['few']} layers, s", "pruning in all", *STAGES.values(), "device GiB"], rows))
    head = [*STAGES.values(), "device GiB", "forwards TFLOP/s", "of card", "pruning TFLOP/s"]
    if "settings" in parts:
        rows = [
            [name, *_stages(row["seconds"]), *_memory(row), *_achieved(row, rates)] for name, row in parts["settings"].items()
        ]
        sections.append(markdown([f"{shape['few']} layers, s", *head], rows))
    if "whole" in parts:
        rows = []
        for name, row in parts["whole"].items():
            total, load = row["seconds"]["total"], row["seconds"]["load"]
            rest = total - load - sum(row["seconds"].get(stage, 0) for stage in STAGES)
            times = [f"{load:.2f}", *_stages(row["seconds"]), f"{rest:.2f}", f"{total:.2f}"]
            rows.append([name, *times, *_memory(row), *_achieved(row, rates)])
        sections.append(markdown([f"{shape['all']} layers, s", "load", *STAGES.values(), "rest", "total", *head[3:]], rows))
    if "memory" in parts:
        rows = [
            [name, row.get("error") or "; ".join([f"{row['seconds']['total']:.1f} s", *row["notes"]]), *_memory(row)]
            for name, row in parts["memory"].items()
        ]
        sections.append(markdown(["device memory", "outcome", "device GiB"], rows))
    is_rehearsal = (found["settings"]["device"], found["settings"]["shape"]) != ("cuda", "llama-3-8b")
    sections.append(
        markdown(["goals, llama-3-8b on an H100 or H200", "asked", "measured", "met"], goal_rows(parts, is_rehearsal))
    )
    sections += [f"{name} skipped: {reason}" for name, reason in found["skipped"].items()]
    sections += [f"{name} failed: {reason}" for name, reason in found["failed"].items()]
    return "\n\n".join(sections)


STAGES = {"calibration": "forwards and statistics", "prune": "pruning", "write": "writing layers"}


def _stages(seconds: dict[str, float], key: str = "{}") -> list[str]:
    return [f"{seconds[key.format(stage)]:.2f}" if key.format(stage) in seconds else "--" for stage in STAGES]


def _memory(row: dict[str, Any]) -> list[str]:
    return [f"{row['peak_device_bytes'] / 2**30:.1f}" if row.get("peak_device_bytes") else "--"]


def _achieved(row: dict[str, Any], rates: dict[str, float]) -> list[str]:
    """FLOP/s of the forwards with the statistics, their share of the fastest product, and FLOP/s of the pruning."""
    achieved = row["flops_per_second"]
    forwards, solver = achieved["calibration"], achieved.get("prune")
    share = f"{forwards / max(rates.values()):.0%}"
    return [f"{forwards / 1e12:.3g}", share, f"{solver / 1e12:.3g}" if solver else "--"]
