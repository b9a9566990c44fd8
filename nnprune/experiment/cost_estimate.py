"""What a run, or a grid of runs, will take: memory and disk by arithmetic, time by one timed layer. Letters: O outputs, I inputs."""

import copy
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nnprune.allocations.uniform import Uniform
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.hidden_buffer import DEVICE_SHARE
from nnprune.engine.hidden_states import tokens_of_logits
from nnprune.engine.importance_pass import run_importance_pass
from nnprune.engine.input_collector import PROBE_TOKENS, input_groups, rows_needed
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.layer_store import LayerStore
from nnprune.engine.propagation import ROOM_SHARE
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.engine.stopwatch import Stopwatch
from nnprune.experiment.build import Experiment
from nnprune.experiment.job import check_shapes, skeleton, token_ids
from nnprune.model.decoder import Decoder
from nnprune.model.loading import quieten_transformers
from nnprune.records import read_completed
from nnprune.runtime import available_host_bytes, resident_host_bytes
from nnprune.statistics import CrossProduct, Hessian

GIB = 1 << 30
PROCESS_BYTES = 64 << 20  # libraries, threads and freed blocks of a run on a CPU beyond what is there at the start
LOGIT_BYTES = 10  # of a logit: in the model's dtype, in float32, and its log-softmax
SOLVER_MATRICES = 2  # float32 (I, I) that a pruner, target or update with a Hessian keeps for each group of linears...
SOLVER_WORK = 4  # ...and those that come and go while one group is solved
WEIGHT_COPIES = 8  # in float32, of the weights of a group while it is pruned
TUNED_BYTES = (
    26  # of a parameter that is tuned: five in float32 (itself, gradient, Adam's two, the best), in bfloat16, its mask
)
VOCABULARY = 512  # of the timed model


class CostEstimate:
    """`seconds` by stage, peaks in bytes, and `problems` (what does not fit, and the remedy) of the cells of a grid, or one run."""

    def __init__(self, cells: Sequence[Experiment]) -> None:
        self.cells, self.pruned = cells, [cell for cell in cells if not cell.is_dense]
        self.first = first = (self.pruned or cells)[0]
        self.methods, self.runtime, self.device = [one.method for one in self.pruned], first.runtime, first.runtime.torch_device
        self.on_cuda, self.is_sequential = self.device.type == "cuda", first.config["propagate"] == "sequential"
        quieten_transformers()
        self.runtime.start(first.config["seed"])
        self.free_device = torch.cuda.mem_get_info(self.device)[0] if self.on_cuda else 0  # before the timed layers take any
        start, config, tokenizer = time.perf_counter(), first.source.config(), first.source.tokenizer()
        self.decoder = skeleton(first, config)
        for cell in cells:
            check_shapes(cell, self.decoder)
        ids, evaluation = token_ids(first, config, tokenizer)
        self.calibration, self.windows = rows_needed(self.methods, ids), list(evaluation.values())
        self.measures_dense = first.is_dense or read_completed(first.dense().folder) is None
        self.seq_len = max((ids.shape[1] for ids in (self.calibration, *self.windows) if len(ids)), default=PROBE_TOKENS)
        self.seconds = {"data": time.perf_counter() - start}
        base, self.free_host = resident_host_bytes() + PROCESS_BYTES, available_host_bytes()
        self._time(config)
        self.host_bytes, self.device_bytes, self.disk_bytes = self._bytes(resident_host_bytes() if self.on_cuda else base)
        self.problems = self._problems()

    def lines(self) -> list[str]:
        """The estimate as text."""
        rows = {**self.seconds, "total": sum(self.seconds.values())}
        device = f", device {self.device_bytes / GIB:.2f} GiB" if self.on_cuda else ""
        peak = f"peak: host {self.host_bytes / GIB:.2f} GiB{device}; disk {self.disk_bytes / GIB:.2f} GiB"
        title = [f"grid: {len(self.cells)} cells"] * (len(self.cells) > 1)
        return [*title, f"{'stage':<18}{'seconds':>10}", *(f"{name:<18}{value:>10.1f}" for name, value in rows.items()), peak]

    def _time(self, config: Any) -> None:
        """Take a batch through a pruning pass over two layers of random weights, and scale `seconds` to the whole run."""
        ids = torch.randint(VOCABULARY, (max(self.runtime.rows_per_batch(self.seq_len), 2), self.seq_len))
        logging.disable(logging.INFO)
        try:
            for _ in range(1 + self.on_cuda):  # the first time Triton compiles
                with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                    seconds = self._pass(config, ids, Path(folder))
        finally:
            logging.disable(logging.NOTSET)
        num_layers = len(self.decoder.layers)
        forward = seconds.pop("dense_evaluation") * num_layers / ids.numel()  # of a token through all layers
        share = self.calibration.numel() / ids.numel()
        head = (
            self.decoder.vocab_size
            * self.decoder.text_config.hidden_size
            / sum(map(torch.numel, self.decoder.layers.parameters()))
        )
        for stage, value in seconds.items():
            self.seconds[stage] = value * num_layers * (share if stage in ("calibration", "recover") else 1)
        if self.first.allocation.looks_at == "inputs" and self.pruned:
            self.seconds["allocation"] += forward * self.calibration.numel()
        windows = sum(map(torch.numel, self.windows)) * forward * (1 + head)
        self.seconds |= {"dense_evaluation": windows * self.measures_dense, "evaluation": windows * len(self.pruned)}

    def _pass(self, config: Any, ids: torch.Tensor, folder: Path) -> dict[str, float]:
        """Stage -> seconds for a layer; also finds the `groups` of linears that share an input."""
        first, runtime, watch = self.first, self.runtime, Stopwatch()
        decoder = Decoder(first.source.random(_two_layers(config)), first.source.layers_path)
        finished = [LayerFiles(folder / str(index), decoder.path) for index in range(max(len(self.pruned), 1))]
        rest = "host" if runtime.layers == "disk" else runtime.layers
        engine = LayerwiseEngine(
            decoder, LayerStore(decoder, self.device, rest, finished[0], None, first.computing_dtype), runtime, folder
        )
        plans = [Uniform().plan(cell.pattern, decoder.shapes_by_layer()) for cell in self.pruned]  # as good as any
        with engine.hidden_states(ids, "windows") as stream:
            layer = engine.store.fetch(0)
            self.groups = input_groups(decoder.linears(0), lambda: stream.run(0, layer, stream.probe(PROBE_TOKENS)))
            stream.run(0, layer, stream.activations.get(slice(0, len(ids))))  # the first call of a kernel is slow
            if first.allocation.looks_at != "nothing" and self.pruned:
                with watch.stage("allocation"):
                    run_importance_pass(engine, ids, {"": partial(first.allocation.measure, pattern=first.pattern)})
            cells = [PruneTask(*cell) for cell in zip(self.methods, plans, finished, strict=False)]
            PruningPass(engine, cells, first.config["propagate"], watch).run(ids, [stream])
        return {stage: value / len(decoder.layers) for stage, value in watch.seconds.items()}

    def _bytes(self, base: int) -> tuple[int, int, int]:
        """Peaks of the host, the device and the disk."""
        runtime, decoder, is_grid = self.runtime, self.decoder, len(self.cells) > 1
        inside, item = set(decoder.layers.parameters()), decoder.model.dtype.itemsize
        layers, layer = (sum(one.nbytes for one in part) for part in (inside, decoder.layers[0].parameters()))
        shell = sum(one.nbytes for one in set(decoder.model.parameters()) - inside)
        near, saved = "device" if self.on_cuda else "host", len(self.cells) * bool(self.first.config["save"])
        rests = {
            "host": base,
            "device": shell + self._workspace(),
            "disk": layers * max(len(self.pruned), saved) + shell * saved,
        }
        if runtime.layers != "disk":  # pinned memory comes in powers of two
            rests[runtime.layers] += layers + (layers // 2 if self.on_cuda and runtime.layers == "host" else 0)
        if runtime.layers == "disk" or (
            self.on_cuda and runtime.layers == "host"
        ):  # two fetched, the mapped file of the second
            rests["device"] += 3 * layer
        width, streams = decoder.text_config.hidden_size * item, 1 + self.first.method.needs_reference
        calibration = [self.calibration.numel() * width] * streams * (1 + self.is_sequential)  # shortcuts keep as much again
        windows = [ids.numel() * width for ids in self.windows] * (self.measures_dense + bool(self.pruned))
        for num_bytes in max(calibration, windows, key=sum) if is_grid else calibration + windows:  # a grid prunes first
            fits = not self.on_cuda or num_bytes < DEVICE_SHARE * (self.free_device - rests["device"])
            rests[runtime.activations if runtime.activations != "auto" else near if fits else "host"] += num_bytes
        if not self.on_cuda:
            rests["host"] += rests.pop("device")
        if self.is_sequential and runtime.activations in ("auto", near):  # outputs of linears, kept where there is room
            shapes, share = decoder.shapes_by_layer()[0], DEVICE_SHARE if self.on_cuda else ROOM_SHARE
            kept = item * sum(shapes[name][0] for names in self.groups[1:-1] for name in names) + (streams - 1) * width
            room = (self.free_device if self.on_cuda else self.free_host) - rests[near]
            rests[near] += min(self.calibration.numel() * kept, max(int(share * room), 0))
        return rests["host"], rests.get("device", 0), rests["disk"]

    def _workspace(self) -> int:
        """Bytes that computing takes beside weights and activations at rest."""
        shapes, item, vocab_size = self.decoder.shapes_by_layer()[0], self.decoder.model.dtype.itemsize, self.decoder.vocab_size
        logits = LOGIT_BYTES * tokens_of_logits(self.device, self.seq_len, vocab_size) * vocab_size * bool(self.windows)
        width = sum(outputs for outputs, _ in shapes.values()) + 4 * self.decoder.text_config.hidden_size
        tokens = self.runtime.rows_per_batch(self.seq_len) * self.seq_len
        forward = tokens * (item * width + 4 * max(inputs for _, inputs in shapes.values()))
        if not self.pruned:
            return max(logits, forward)
        recovery, paired = self.first.method.recovery, self.is_sequential and self.first.method.needs_reference
        sizes = [sum(math.prod(shapes[name]) for name in names) for names in self.groups]
        widths = sorted(shapes[names[0]][1] for names in self.groups)[-2 if self.is_sequential else 0 :]  # the last one lingers
        shared = {kind for one in self.methods for kind in one.statistics} & {Hessian, CrossProduct}
        users = [
            use for one in self.methods for use in (one.pruner.statistic, one.update.statistic, *one.target.statistics[:1])
        ]
        matrices = len(shared) + SOLVER_MATRICES * users.count(Hessian)
        statistics = sum(4 * matrices * width * width + 8 * width for width in widths)
        solving = 4 * (SOLVER_WORK * bool(shared) * widths[-1] ** 2 + WEIGHT_COPIES * max(sizes))
        dense = item * sum(sizes) * (len(self.pruned) > 1 or paired)  # the dense layer beside the pruned one
        tuning = (TUNED_BYTES * sum(sizes) + 12 * tokens * width) * recovery.is_on
        return max(logits, statistics + dense + max(solving, forward, tuning))

    def _problems(self) -> list[str]:
        outputs = Path(str(self.first.config["outputs"])).absolute()
        there = next(folder for folder in (outputs, *outputs.parents) if folder.exists())
        host = "runtime=low_memory, which keeps layers and activations on disk"
        if self.runtime.layers == self.runtime.activations == "disk":
            host = "a machine with more memory, or a lower calibration.num_samples"
        device = "runtime.layers=host runtime.activations=host, or a lower runtime.batch_tokens"
        rows = (
            ("host memory", self.host_bytes, self.free_host, host),
            ("device memory", self.device_bytes, self.free_device, device),
            (f"disk {there}", self.disk_bytes, shutil.disk_usage(there).free, "outputs to a larger disk"),
        )
        text = "{}: needs {:.1f} GiB, there are {:.1f}; set {}"
        return [text.format(name, need / GIB, free / GIB, remedy) for name, need, free, remedy in rows if need > free]


def _two_layers(config: Any) -> Any:
    """The configuration of a model with two such layers and hardly any shell."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # such as layer_types
            setattr(text, key, value[:2])
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = min(text.num_hidden_layers, 2), VOCABULARY, None
    return config
