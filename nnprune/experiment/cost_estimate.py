"""What a run, or the cells of a grid, will take: memory and disk by arithmetic, seconds by a short pass over random layers.

Start-up and texts take what they took to make the estimate."""

import shutil
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch

from nnprune.engine.input_collector import rows_needed
from nnprune.engine.memory import fit_device
from nnprune.engine.stopwatch import Stopwatch
from nnprune.experiment.build import Experiment
from nnprune.experiment.preparation import check_shapes, skeleton, token_ids, workload
from nnprune.experiment.timed_layers import VOCABULARY, time_layers
from nnprune.model.loading import quieten_transformers
from nnprune.records import read_completed
from nnprune.recovery.base import Recovery
from nnprune.runtime import available_host_bytes, peak_host_bytes, resident_host_bytes

GIB = 1 << 30
LIBRARIES = 80 << 20  # bytes of code, buffers of libraries and threads that a run touches before it loads weights
EPOCH_FORWARDS = 6  # as long as an epoch of distillation takes: a forward, another for the gradients, these, and Adam's steps
TIMED_TOKENS = {"cpu": 1024, "cuda": 16384}


def mean_passes(recovery: Recovery, num_layers: int) -> float:
    """Passes of the calibration through a decoder layer that a recovery tunes, mean over the layers: the first windows are smaller, and
    the last one has epochs of its own."""
    before, after, window = recovery.epochs_before, recovery.epochs_after, recovery.num_layers
    passes = [before + after * min(index + 1, window) for index in range(num_layers)]
    if recovery.logits_epochs:
        passes[-1] = recovery.logits_epochs * (bool(before) + bool(after) * min(num_layers, window))
    return fmean(passes)


class CostEstimate:
    """`seconds` by stage; `host_bytes`, `device_bytes`, `disk_bytes`: the peaks; `problems`: what does not fit, with its remedy.

    All cells share model and calibration. Mapped files count as host memory, as the system counts them.
    """

    def __init__(self, cells: Sequence[Experiment]) -> None:
        self.seconds = {"start": time.process_time()}
        self.cells, self.pruned = cells, [cell for cell in cells if not cell.is_dense]
        self.first = (self.pruned or cells)[0]
        self.runtime, self.device = self.first.runtime, self.first.runtime.torch_device
        self.distillation = self.first.method.distillation if self.pruned else None
        quieten_transformers()
        self.runtime.start(self.first.config["seed"])
        self.on_cuda = self.device.type == "cuda"
        self.free_device = self.runtime.free_device_bytes()  # before the timed layers take any
        watch = Stopwatch()
        with watch.stage("data"):
            config = self.first.source.config()
            self.decoder = skeleton(self.first, config)
            for cell in cells:
                check_shapes(cell, self.decoder)
            self.ids, texts = token_ids(self.first, config, self.first.source.tokenizer())
        self.windows = list(chain.from_iterable(texts.values()))
        self.measures_dense = self.first.is_dense or read_completed(self.first.dense().folder) is None
        methods, num_measured = [cell.method for cell in self.pruned], self.measures_dense + bool(self.pruned)
        self.load = workload(self.first, self.decoder, [], methods, self.ids, self.windows, num_measured)
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
        rows = max(TIMED_TOKENS[self.device.type] // self.load.seq_len, 1 + self.first.method.recovery.is_on)
        ids = torch.randint(VOCABULARY, (rows, self.load.seq_len))
        for _ in range(2):  # the first time warms up
            timed, self.load.groups, num_parameters = time_layers(self.pruned or self.cells, ids, self.decoder)
        seconds = {stage: value * self.in_layers / num_parameters for stage, value in timed.items()}
        seconds["load"] *= self.outside / self.in_layers + (self.runtime.layers != "disk")
        recovery, num_layers = self.first.method.recovery, len(self.decoder.layers)
        if "recover" in seconds:
            num_timed = max(round(num_layers * num_parameters / self.in_layers), 1)
            seconds["recover"] *= mean_passes(recovery, num_layers) / mean_passes(recovery, num_timed)
        for stage in {"calibration", "recover"} & set(seconds):
            seconds[stage] *= self.load.calibration / rows_needed([self.first.method], ids).numel()
        forward = seconds["dense_evaluation"] / ids.numel()  # of a token through all layers
        if self.first.allocation.looks_at == "inputs" and self.pruned:
            seconds["allocation"] += forward * self.load.calibration
        head = self.decoder.vocab_size * self.decoder.text_config.hidden_size / self.in_layers
        if recovery.logits_epochs and self.pruned:
            seconds["recover"] += forward * self.load.calibration * EPOCH_FORWARDS * recovery.logits_epochs * head
        if self.distillation:  # the dense outputs, then its epochs
            passes = 1 + EPOCH_FORWARDS * self.distillation.epochs * (1 + head)
            seconds["recover"] = seconds.get("recover", 0) + forward * self.ids.numel() * passes
        windows = forward * (1 + head) * sum(map(torch.numel, self.windows))
        return seconds | {"dense_evaluation": windows * self.measures_dense, "evaluation": windows * len(self.pruned)}

    def _count_bytes(self, base: int) -> tuple[int, int, int]:
        """Peaks of the host, which holds `base` before weights are loaded, of the device and of the disk."""
        runtime, source, num_layers = self.runtime, self.first.source, len(self.decoder.layers)
        stored, computing = source.stored_dtype.itemsize, self.first.computing_dtype.itemsize
        layers, others = stored * self.in_layers, stored * self.outside
        is_copied = self.on_cuda or computing != stored  # on the way to where layers compute
        stays = runtime.layers == "device" or (runtime.layers == "host" and not is_copied)
        weights = computing / stored * (others + layers * (1 if stays else self.load.fetched_layers / num_layers))
        if self.on_cuda:
            fit_device(runtime, self.load, self.free_device - computing / stored * (others + layers * stays))
        near = weights + self.load.workspace_bytes(runtime)
        calibration, windows = self.load.hidden_bytes(is_cached=runtime.activations != "disk")
        hidden = max(calibration, windows) if len(self.cells) > 1 else calibration + windows
        offloaded = layers * (runtime.layers == "host" and is_copied)
        is_whole = runtime.layers != "disk" and not source.files.is_safetensors
        loading = (layers + others) * is_copied * is_whole  # the mapped checkpoint, while it is copied
        num_saved = len(self.cells) * self.first.config["save"]
        num_layer_files = len(self.pruned) * (1 + bool(self.distillation))
        disk = layers * (num_layer_files + (num_saved > 0)) + others * num_saved + hidden * (runtime.activations == "disk")
        if not self.on_cuda:
            return int(base + offloaded + max(near + hidden, loading)), 0, int(disk)
        on_device = runtime.activations == "device" or (runtime.activations == "auto" and near + hidden < self.free_device)
        host = base + offloaded + max(hidden * (not on_device), loading)
        return int(host), int(near + hidden * on_device), int(disk)

    def _find_problems(self) -> list[str]:
        outputs = Path(str(self.first.config["outputs"])).absolute()
        folder = next(parent for parent in (outputs, *outputs.parents) if parent.exists())
        is_low = self.runtime.layers == self.runtime.activations == "disk"
        host = "a machine with more memory, or a lower calibration.num_samples" if is_low else "runtime=low_memory"
        host = "recover=layer" if self.distillation and not self.on_cuda else host
        device = "recover=layer" if self.distillation else "runtime.layers=host runtime.activations=host"
        needs = (
            ("host memory", self.host_bytes, self.free_host, host),
            ("device memory", self.device_bytes, self.free_device, device),
            (f"disk {folder}", self.disk_bytes, shutil.disk_usage(folder).free, "outputs to a larger disk"),
        )
        text = "{}: needs {:.1f} GiB, there are {:.1f}; set {}"
        return [text.format(key, need / GIB, free / GIB, remedy) for key, need, free, remedy in needs if need > free]
