"""Methods on single decoder layers of a real model: layer error and time, relative to SparseGPT's.

    python benchmarks/solvers.py --model DIR --calibration FILE.txt --layers 3,15,27

The dense model's inputs of the chosen layers are accumulated once; then each method prunes their linears, in turn, several
times over. The error of a linear is tr((W - W0) H (W - W0)^T), H = E[x x^T]; errors are compared by the geometric mean over
linears, times by the sum over a layer's groups of their medians.

Letters: O output features, I input features.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages of this checkout, installed or not

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from benchmarks.machine import description
from benchmarks.peers.official import HessianStatistic
from benchmarks.report import markdown
from nnprune.calibration import TextCalibration
from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.importance_pass import collect_inputs
from nnprune.method import Method
from nnprune.model.decoder import Decoder
from nnprune.model.loading import ModelSource, quieten_transformers
from nnprune.patterns import NM, SparsityPattern, parse_pattern
from nnprune.pruners.base import Pruner
from nnprune.run import CONF
from nnprune.runtime import Runtime
from nnprune.statistics import Hessian, InputStatistic, Moments, SquaredNorm

BASE = "sparsegpt"
OFFICIAL = "official"
"""The loop of the authors' SparseGPT class, a linear at a time."""

NO_ERROR = 1e-12
"""What counts instead of no error at all, where inputs are dead."""


class Official(Pruner):
    """benchmarks/peers/official.py as a pruner."""

    statistic = Hessian

    def prune_linear(self, W: Tensor, module_name: str, pattern: SparsityPattern) -> Tensor:
        loop = HessianStatistic(torch.nn.Linear(W.shape[1], 1))
        loop.hessian = 2 * self.statistics[module_name].mean()
        nm = (pattern.n, pattern.m) if isinstance(pattern, NM) else None
        return loop.prune(W.clone(), SimpleNamespace(nm=nm, sparsity=float(pattern.sparsity)))


class Group:
    """Linears that share an input: weights (O, I) by name, and the statistics of what they receive."""

    def __init__(self, weights: dict[str, Tensor], statistics: dict[type[InputStatistic], InputStatistic]) -> None:
        self.weights = weights
        self.statistics = statistics
        self.hessian = statistics[Hessian].mean().double()

    def prune(self, method: Method, pattern: str) -> tuple[dict[str, Tensor], float]:
        """Pruned weights and seconds, with nothing left over from an earlier round."""
        for statistic in self.statistics.values():
            statistic._memo.clear()
        pruner, update = method.pruner, method.update
        if pruner.statistic is not None:
            pruner.statistics.update(dict.fromkeys(self.weights, self.statistics[pruner.statistic]))
        targets = {name: W.float() for name, W in self.weights.items()}
        start = time.perf_counter()
        pruned = pruner.prune_group(targets, dict.fromkeys(targets, parse_pattern(pattern)))
        pruned = update.update_group(pruned, targets, self.statistics.get(update.statistic))
        return pruned, time.perf_counter() - start

    def errors(self, pruned: dict[str, Tensor]) -> list[float]:
        """tr((W - W0) H (W - W0)^T) of each linear."""
        differences = [pruned[name].double() - W.double() for name, W in self.weights.items()]
        return [float((difference @ self.hessian * difference).sum()) for difference in differences]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a directory made by save_pretrained, or demo")
    add("--calibration", required=True, help="a text file; demo:calibration.txt is the demo's")
    add("--layers", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    add(
        "--methods",
        type=lambda text: text.split(","),
        default=["wanda", "swaps", "sparsegpt_refit", "admm", "alps"],
        help="of conf/pruner, with settings behind slashes: alps/pruner.num_iterations=5; official: the authors' loop of SparseGPT",
    )
    add("--patterns", type=lambda text: text.split(","), default=["0.5", "0.7", "2:4", "4:8"])
    add("--num-samples", type=int, default=32)
    add("--seq-len", type=int, default=1024)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    add("--json", type=Path, metavar="FILE", help="all that was measured")
    return parser.parse_args()


def methods(names: list[str]) -> dict[str, Method]:
    """The methods of conf/pruner by name: pruner and update; their targets and recoveries belong to whole models."""
    found = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name in names:
            if name == OFFICIAL:
                found[name] = Method(Official())
                continue
            pruner, *settings = name.split("/")
            cfg = compose("config", [f"pruner={pruner}", *settings])
            found[name] = Method(instantiate(cfg["pruner"], _convert_="all"), update=instantiate(cfg["update"]))
    return found


@torch.no_grad()
def layer_groups(args: argparse.Namespace) -> dict[int, list[Group]]:
    """The groups of linears of the chosen layers, with the statistics of what the dense model feeds them."""
    source = ModelSource(args.model)
    decoder = Decoder(source.load(source.config()))
    calibration = TextCalibration(args.num_samples, args.seq_len, 0, path=args.calibration)
    ids = calibration.token_ids(source.tokenizer(), decoder.vocab_size)
    found = {}
    with HiddenStates(decoder, Runtime(device="cpu"), ids, Path("unused")) as stream:
        for index in range(max(args.layers) + 1):
            layer, linears = decoder.layers[index], decoder.weights(index)
            if index not in args.layers:
                stream.advance(index, layer)
                continue

            kinds = [Hessian, SquaredNorm, Moments]
            collector = collect_inputs(stream, index, layer, kinds, is_last=index == max(args.layers))
            found[index] = [
                Group({name: linears[name].read().clone() for name in names}, collector.statistics[names[0]])
                for names in collector.groups
            ]
    return found


def measure(args: argparse.Namespace, pattern: str, layers: dict[int, list[Group]]) -> dict[str, dict[str, float]]:
    """Method -> geometric mean of its errors, sum of its median seconds, both relative to SparseGPT's."""
    chosen = methods([BASE, *(name for name in args.methods if name != BASE)])
    logs: dict[str, list[float]] = {name: [] for name in chosen}
    seconds = dict.fromkeys(chosen, 0.0)
    for groups in layers.values():
        for group in groups:
            times: dict[str, list[float]] = {name: [] for name in chosen}
            for number in range(args.rounds + 1):  # the first one warms up
                for name, method in chosen.items():
                    pruned, taken = group.prune(method, pattern)
                    if number:
                        times[name].append(taken)
                    else:
                        logs[name] += [math.log(max(error, NO_ERROR)) for error in group.errors(pruned)]
            for name in chosen:
                seconds[name] += median(times[name])
    return {
        name: {
            "error": math.exp(sum(one - base for one, base in zip(logs[name], logs[BASE], strict=True)) / len(logs[name])),
            "time": seconds[name] / seconds[BASE],
            "seconds": seconds[name] / len(layers),
        }
        for name in chosen
    }


def main() -> None:
    """Measure and print what the command line asks for."""
    args = parse_args()
    quieten_transformers()
    if args.threads:
        torch.set_num_threads(args.threads)
    layers = layer_groups(args)
    results = {pattern: measure(args, pattern, layers) for pattern in args.patterns}
    machine = description("cpu", args.threads)
    print(f"{Path(args.model).name}, layers {args.layers}, {args.num_samples} x {args.seq_len} tokens; {machine['device']}")
    header = ["method", *(f"{pattern} {what}" for pattern in args.patterns for what in ("error", "time"))]
    rows = [
        [name, *(f"{results[pattern][name][what]:.2f}" for pattern in args.patterns for what in ("error", "time"))]
        for name in next(iter(results.values()))
    ]
    print(markdown(header, rows))
    base = ", ".join(f"{pattern} {results[pattern][BASE]['seconds']:.2f} s" for pattern in args.patterns)
    print(f"{BASE} itself, a layer: {base}")
    if args.json:
        settings = {**vars(args), "json": str(args.json)}
        args.json.write_text(json.dumps({"settings": settings, "machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
