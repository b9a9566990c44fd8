"""What a run, or the cells of a grid, will take: memory and disk by arithmetic, seconds by a short pass over random layers.

Start-up and texts take what they took to make the estimate."""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nnprune.engine.hidden_states import tokens_of_logits
from nnprune.engine.input_collector import PROBE_TOKENS, rows_needed
from nnprune.engine.stopwatch import Stopwatch
from nnprune.experiment.build import Experiment
from nnprune.experiment.preparation import check_shapes, skeleton, token_ids
from nnprune.experiment.timed_layers import LAYERS, VOCABULARY, time_layers
from nnprune.model.loading import quieten_transformers
from nnprune.records import read_completed
from nnprune.runtime import available_host_bytes, peak_host_bytes, resident_host_bytes
from nnprune.statistics import CrossProduct, Hessian

GIB = 1 << 30
LIBRARIES = 48 << 20  # bytes of code and threads that a run touches before it loads weights
TIMED_TOKENS = {"cpu": 1024, "cuda": 16384}
FETCHED = 3  # layers in memory where they come and go: one computes, the next arrives, beside a file or a copy
HESSIANS, SOLVING = 3, 6  # float32 (I, I): what a reader keeps for each Hessian, and what solving one takes for a while
WEIGHT_COPIES = 12  # in float32, of the linears of one input while they are pruned
TUNED_BYTES = 26  # of a tuned parameter: itself, gradient, Adam's two, the best so far, a 16-bit copy, its mask


class CostEstimate:
    """`seconds` by stage; `host_bytes`, `device_bytes`, `disk_bytes`: the peaks; `problems`: what does not fit, with its remedy.

    All cells share model and calibration. Mapped files count as host memory, as the system counts them.
    """

    def __init__(self, cells: Sequence[Experiment]) -> None:
        self.seconds = {"start": time.process_time()}
        self.cells, self.pruned = cells, [cell for cell in cells if not cell.is_dense]
        self.first = (self.pruned or cells)[0]
        self.runtime, self.device = self.first.runtime, self.first.runtime.torch_device
        quieten_transformers()
        self.runtime.start(self.first.config["seed"])
        self.on_cuda, self.is_sequential = self.device.type == "cuda", self.first.config["propagate"] == "sequential"
        self.free_device = torch.cuda.mem_get_info(self.device)[0] if self.on_cuda else 0  # before the timed layers take any
        watch = Stopwatch()
        with watch.stage("data"):
            config = self.first.source.config()
            self.decoder = skeleton(self.first, config)
            for cell in cells:
                check_shapes(cell, self.decoder)
            ids, texts = token_ids(self.first, config, self.first.source.tokenizer())
        self.calibration, self.windows = rows_needed([cell.method for cell in self.pruned], ids), list(texts.values())
        self.seq_len = max((rows.shape[1] for rows in (self.calibration, *self.windows) if len(rows)), default=PROBE_TOKENS)
        self.measures_dense = self.first.is_dense or read_completed(self.first.dense().folder) is None
        self.free_host, base, peak = available_host_bytes(), resident_host_bytes() + LIBRARIES, peak_host_bytes()
        self.in_layers = sum(map(torch.numel, self.decoder.layers.parameters()))  # parameters; below tied ones once
        model = self.decoder.model
        untied = (one.numel() for name, one in model.named_parameters() if name not in model.all_tied_weights_keys)
        self.outside = sum(untied) - self.in_layers
        self.seconds |= watch.seconds | self._count_seconds()
        host, self.device_bytes, self.disk_bytes = self._count_bytes(resident_host_bytes() if self.on_cuda else base)
        self.host_bytes = max(host, peak)
        self.problems = self._find_problems()

    def _count_seconds(self) -> dict[str, float]:
        """Stage -> seconds: those of the timed layers, scaled to all layers and tokens, and to the cells' own evaluations."""
        rows = max(TIMED_TOKENS[self.device.type] // self.seq_len, 1 + self.first.method.recovery.is_on)
        ids = torch.randint(VOCABULARY, (rows, self.seq_len))
        for _ in range(2):  # the first time warms up
            timed, self.groups = time_layers(self.pruned or self.cells, ids, self.decoder.path)
        seconds = {stage: value * len(self.decoder.layers) / LAYERS for stage, value in timed.items()}
        seconds["load"] *= self.outside / self.in_layers + (self.runtime.layers != "disk")
        for stage in {"calibration", "recover"} & set(seconds):
            seconds[stage] *= self.calibration.numel() / ids.numel()
        forward = seconds["dense_evaluation"] / ids.numel()  # of a token through all layers
        if self.first.allocation.looks_at == "inputs" and self.pruned:
            seconds["allocation"] += forward * self.calibration.numel()
        head = self.decoder.vocab_size * self.decoder.text_config.hidden_size / self.in_layers
        windows = forward * (1 + head) * sum(map(torch.numel, self.windows))
        return seconds | {"dense_evaluation": windows * self.measures_dense, "evaluation": windows * len(self.pruned)}

    def _count_bytes(self, base: int) -> tuple[int, int, int]:
        """Peaks of the host, which holds `base` before weights are loaded, of the device and of the disk."""
        runtime, source, num_layers = self.runtime, self.first.source, len(self.decoder.layers)
        stored, computing = source.stored_dtype.itemsize, self.first.computing_dtype.itemsize
        layers, others = stored * self.in_layers, stored * self.outside
        is_copied = self.on_cuda or computing != stored  # on the way to where layers compute
        stays = runtime.layers == "device" or (runtime.layers == "host" and not is_copied)
        near = computing / stored * (others + layers * (1 if stays else FETCHED / num_layers)) + self._workspace()
        token = self.decoder.text_config.hidden_size
        copies = (1 + self.first.method.needs_reference) * (1 + self.is_sequential)  # the attention's outputs beside each
        outputs = sum(shape[0] for shape in self.decoder.shapes_by_layer()[0].values())
        cached = outputs * (self.is_sequential and self.runtime.activations != "disk")
        calibration = self.calibration.numel() * (token * copies + cached)
        windows = sum(map(torch.numel, self.windows)) * token * (self.measures_dense + bool(self.pruned))
        hidden = computing * (max(calibration, windows) if len(self.cells) > 1 else calibration + windows)
        offloaded = layers * (runtime.layers == "host" and is_copied)
        is_whole = runtime.layers != "disk" and not source.files.is_safetensors
        loading = (layers + others) * is_copied * is_whole  # the mapped checkpoint, while it is copied
        num_saved = len(self.cells) * self.first.config["save"]
        disk = layers * (len(self.pruned) + (num_saved > 0)) + others * num_saved + hidden * (runtime.activations == "disk")
        if not self.on_cuda:
            return int(base + offloaded + max(near + hidden, loading)), 0, int(disk)
        on_device = runtime.activations == "device" or (runtime.activations == "auto" and near + hidden < self.free_device)
        host = base + offloaded + max(hidden * (not on_device), loading)
        return int(host), int(near + hidden * on_device), int(disk)

    def _workspace(self) -> int:
        """Bytes that computing takes beside weights and hidden states: a batch, logits, statistics, solvers, tuning."""
        shapes, computing = self.decoder.shapes_by_layer()[0], self.first.computing_dtype.itemsize
        vocab_size, tokens = self.decoder.vocab_size, self.runtime.rows_per_batch(self.seq_len) * self.seq_len
        logits = (computing + 8) * vocab_size * tokens_of_logits(self.device, self.seq_len, vocab_size) * bool(self.windows)
        inputs = [shapes[names[0]][1] for names in self.groups]
        batch = tokens * (computing * sum(shape[0] for shape in shapes.values()) + 4 * max(inputs))
        if not self.pruned:
            return max(logits, batch)
        methods = [cell.method for cell in self.pruned]
        kinds = {kind for method in methods for kind in method.statistics if kind in (Hessian, CrossProduct)}
        users = {type(user): user.statistic for method in methods for user in (method.pruner, method.update)}
        readers = sum(kind is Hessian for kind in users.values()) + (CrossProduct in kinds)
        squares = sorted(width * width for width in inputs)[-2 if self.is_sequential else 0 :]
        matrices = (len(kinds) + HESSIANS * readers) * sum(squares) + SOLVING * max(squares) * bool(kinds)
        copies = WEIGHT_COPIES * max(sum(math.prod(shapes[name]) for name in names) for names in self.groups)
        tuning = TUNED_BYTES * sum(map(math.prod, shapes.values())) * self.first.method.recovery.is_on
        return max(logits, 4 * matrices + max(4 * copies, batch + tuning))

    def _find_problems(self) -> list[str]:
        outputs = Path(str(self.first.config["outputs"])).absolute()
        folder = next(parent for parent in (outputs, *outputs.parents) if parent.exists())
        is_low = self.runtime.layers == self.runtime.activations == "disk"
        host = "a machine with more memory, or a lower calibration.num_samples" if is_low else "runtime=low_memory"
        needs = (
            ("host memory", self.host_bytes, self.free_host, host),
            ("device memory", self.device_bytes, self.free_device, "runtime.layers=host runtime.activations=host"),
            (f"disk {folder}", self.disk_bytes, shutil.disk_usage(folder).free, "outputs to a larger disk"),
        )
        text = "{}: needs {:.1f} GiB, there are {:.1f}; set {}"
        return [text.format(key, need / GIB, free / GIB, remedy) for key, need, free, remedy in needs if need > free]
