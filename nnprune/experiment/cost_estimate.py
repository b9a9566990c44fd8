"""What a run, or a grid of runs, will take, without its weights: memory and disk by arithmetic, seconds by two random layers."""

import logging
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from nnprune.allocations.uniform import Uniform
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.hidden_buffer import DEVICE_SHARE
from nnprune.engine.hidden_states import tokens_of_logits
from nnprune.engine.importance_pass import run_importance_pass
from nnprune.engine.input_collector import PROBE_TOKENS, input_groups, rows_needed
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.layer_store import LayerStore
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.engine.stopwatch import Stopwatch
from nnprune.experiment.build import Experiment
from nnprune.experiment.job import check_shapes, skeleton, token_ids
from nnprune.model.attention import use_kernel
from nnprune.model.decoder import Decoder
from nnprune.records import read_completed
from nnprune.runtime import available_host_bytes, peak_host_bytes, resident_host_bytes
from nnprune.statistics import CrossProduct, Hessian

GIB = 1 << 30
LIBRARIES = 48 << 20  # bytes of code and threads that a run touches beyond what is there before it loads weights
LOAD_RATE = GIB // 2  # bytes a second of a checkpoint that is read and checked
TIMED_TOKENS = {"cpu": 1024, "cuda": 16384}  # enough for the rate of full batches
TIMED_LAYERS, TIMED_VOCABULARY = 2, 512  # one layer hands its outputs to the other; embeddings are not timed
FETCHED = 3  # layers in memory where they come and go: one computes, the next arrives, beside a file or a copy
PINNED = 1.5  # blocks of pinned memory come in powers of two
KEPT, SOLVING = 3, 6  # float32 (inputs, inputs) that a user of a Hessian keeps for each, and that come and go for one
WEIGHT_COPIES = 12  # in float32, of the linears of one input while they are pruned
TUNED_BYTES = 26  # of a tuned parameter: five in float32 (itself, gradient, two of Adam, the best), a 16-bit one, its mask


class SynchronisedWatch(Stopwatch):
    """Waits for a CUDA device before it looks at the time."""

    def _switch(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        super()._switch()


class CostEstimate:
    """`seconds` by stage, peaks `host_bytes`, `device_bytes` and `disk_bytes`, and `problems`: what does not fit, with remedies.

    All pages of mapped files count as host memory, as the system counts them, but need not fit: `spare_bytes` of the host's.
    """

    def __init__(self, cells: Sequence[Experiment]) -> None:
        pruned = [cell for cell in cells if not cell.is_dense]
        self.cells, self.pruned, self.methods = cells, pruned, [cell.method for cell in pruned]
        self.first = first = (pruned or cells)[0]
        self.runtime, self.device = first.runtime, first.runtime.torch_device
        self.runtime.start(first.config["seed"])
        self.on_cuda = self.device.type == "cuda"
        self.free_device = torch.cuda.mem_get_info(self.device)[0] if self.on_cuda else 0  # before the timed layers take any
        watch = Stopwatch()
        with watch.stage("data"):
            config, tokenizer = first.source.config(), first.source.tokenizer()
            self.decoder = skeleton(first, config)
            for cell in cells:
                check_shapes(cell, self.decoder)
            ids, texts = token_ids(first, config, tokenizer)
        self.calibration, self.windows = rows_needed(self.methods, ids), list(texts.values())
        self.seq_len = max((ids.shape[1] for ids in (self.calibration, *self.windows) if len(ids)), default=PROBE_TOKENS)
        self.free_host, base, peak = available_host_bytes(), resident_host_bytes(), peak_host_bytes()
        model = self.decoder.model
        self.layers_bytes = sum(one.nbytes for one in self.decoder.layers.parameters())  # as stored
        untied = [one.nbytes for name, one in model.named_parameters() if name not in model.all_tied_weights_keys]
        self.shell_bytes = sum(untied) - self.layers_bytes
        self.measures_dense = first.is_dense or read_completed(first.dense().folder) is None
        self.seconds = self._count_seconds(watch.seconds["data"])
        base = resident_host_bytes() if self.on_cuda else base + LIBRARIES  # the timed layers have loaded CUDA's libraries
        self._count_bytes(base)
        self.host_bytes = max(self.host_bytes, peak)
        self.problems = self._problems()

    def _count_seconds(self, data: float) -> dict[str, float]:
        """Stage -> seconds: those of the timed layers, times layers, and times tokens and cells where these matter."""
        rows = max(TIMED_TOKENS[self.device.type] // self.seq_len, 1 + self.first.method.recovery.is_on)
        ids = rows_needed(self.methods, torch.randint(TIMED_VOCABULARY, (rows, self.seq_len)))
        for _ in range(2):  # the first time warms up
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                timed = self._time_layers(ids, Path(folder))
        seconds = {stage: value * len(self.decoder.layers) / TIMED_LAYERS for stage, value in timed.items()}
        for stage in {"calibration", "recover"} & set(seconds):
            seconds[stage] *= self.calibration.numel() / ids.numel()
        forward = seconds["dense_evaluation"] / ids.numel()  # of a token
        if self.first.allocation.looks_at == "inputs" and self.pruned:
            seconds["allocation"] += forward * self.calibration.numel()
        head = self.decoder.vocab_size * self.decoder.text_config.hidden_size  # weights; and of all layers:
        head /= sum(map(torch.numel, self.decoder.layers.parameters()))
        windows = forward * (1 + head) * sum(map(torch.numel, self.windows))
        jobs = len(self.cells) + (len(self.cells) > 1)  # of a grid the first prunes for all cells
        load = (self.layers_bytes + self.shell_bytes) / LOAD_RATE
        evaluations = {"dense_evaluation": windows * self.measures_dense, "evaluation": windows * len(self.pruned)}
        return {"data": data * jobs, "load": load * jobs} | seconds | evaluations

    def _time_layers(self, ids: torch.Tensor, folder: Path) -> dict[str, float]:
        """Stage -> seconds of the run's own pass over random layers; also finds the `groups` of linears that share an input."""
        first, config, watch = self.first, self.first.source.config(), SynchronisedWatch()
        text = config.get_text_config()
        for key, value in vars(text).items():
            if isinstance(value, list) and len(value) == text.num_hidden_layers:  # such as layer_types
                setattr(text, key, (value * TIMED_LAYERS)[:TIMED_LAYERS])
        text.num_hidden_layers, text.vocab_size, text.pad_token_id = TIMED_LAYERS, TIMED_VOCABULARY, None
        model = first.source.random(config)
        use_kernel(model, self.device)
        decoder = Decoder(model, self.decoder.path)
        finished = [LayerFiles(folder / str(index), decoder.path) for index in range(len(self.cells))]
        rest = "host" if self.runtime.layers == "disk" else self.runtime.layers
        store = LayerStore(decoder, self.device, rest, finished[0], None, first.computing_dtype)
        engine = LayerwiseEngine(decoder, store, self.runtime, folder)
        plans = [Uniform().plan(cell.pattern, decoder.shapes_by_layer()) for cell in self.pruned]  # as good as any
        cells = [PruneTask(*cell) for cell in zip(self.methods, plans, finished, strict=False)]
        logging.disable(logging.INFO)
        with engine.stream(ids, "windows") as stream:
            layer, probe = store.fetch(0), stream.probe(PROBE_TOKENS)
            self.groups = input_groups(decoder.linears(0), lambda: stream.run(0, layer, probe))
            if cells and first.allocation.looks_at != "nothing":
                with watch.stage("allocation"):
                    run_importance_pass(engine, ids, {"": lambda layer: first.allocation.measure(layer, first.pattern)})
            PruningPass(engine, cells, first.config["propagate"], watch).run(ids, [stream])
        logging.disable(logging.NOTSET)
        return watch.seconds

    def _count_bytes(self, base: int) -> None:
        """Peaks of the host, which holds `base` before weights are loaded, of the device and of the disk."""
        first, runtime, num_cells = self.first, self.runtime, len(self.cells)
        is_saved, on_disk = first.config["save"], runtime.activations == "disk"
        hidden, cached = self._activations()
        growth = first.computing_dtype.itemsize / first.source.stored_dtype.itemsize  # of weights, for computing
        moves = self.on_cuda or growth != 1
        stays = runtime.layers == "device" or (runtime.layers == "host" and not moves)  # all layers are where they compute
        fetched = 1 if stays else FETCHED / len(self.decoder.layers)
        device = growth * (self.shell_bytes + fetched * self.layers_bytes) + self._workspace()
        rest = self.layers_bytes * (PINNED if self.on_cuda else 1) * (runtime.layers == "host" and moves)
        loading = self.layers_bytes * (runtime.layers != "disk" and moves)  # the mapped checkpoint, beside what is made of it
        fits = hidden < DEVICE_SHARE * (self.free_device - device)
        if not self.on_cuda:  # the device is the host
            work, device = device + hidden + cached, 0
        elif runtime.activations == "device" or (runtime.activations == "auto" and fits):
            work, device = 0, device + hidden + cached
        else:
            work = hidden
        self.spare_bytes = hidden * on_disk + cached * (not self.on_cuda)
        self.needed_bytes = int(base + rest + work - self.spare_bytes)
        self.host_bytes, self.device_bytes = int(base + rest + max(work, loading + self.shell_bytes * growth)), int(device)
        layer_files = self.layers_bytes * (num_cells if is_saved else len(self.pruned))
        self.disk_bytes = layer_files + self.shell_bytes * num_cells * is_saved + hidden * on_disk

    def _activations(self) -> tuple[int, int]:
        """Bytes of hidden states, and of outputs that propagate=sequential caches where there is room."""
        computing, needs_reference = self.first.computing_dtype.itemsize, self.first.method.needs_reference
        token = self.decoder.text_config.hidden_size
        outputs = sum(shape[0] for shape in self.decoder.shapes_by_layer()[0].values())
        is_sequential = bool(self.pruned) and self.first.config["propagate"] == "sequential"
        streams = (1 + needs_reference) * (1 + is_sequential)  # which holds the attention's outputs beside each
        calibration = streams * self.calibration.numel()
        windows = sum(map(torch.numel, self.windows)) * (self.measures_dense + bool(self.pruned))
        hidden = max(calibration, windows) if len(self.cells) > 1 else calibration + windows  # a grid prunes, then measures
        is_cached = is_sequential and self.runtime.activations != "disk"
        return computing * token * hidden, computing * outputs * self.calibration.numel() * is_cached

    def _workspace(self) -> int:
        """Bytes that computing takes beside weights and activations at rest, with the device's cached batches."""
        shapes, computing = self.decoder.shapes_by_layer()[0], self.first.computing_dtype.itemsize
        vocab_size, tokens = self.decoder.vocab_size, self.runtime.rows_per_batch(self.seq_len) * self.seq_len
        logits = (computing + 8) * vocab_size * tokens_of_logits(self.device, self.seq_len, vocab_size) * bool(self.windows)
        inputs = [shapes[names[0]][1] for names in self.groups]
        forward = tokens * (computing * sum(shape[0] for shape in shapes.values()) + 4 * max(inputs))
        if not self.pruned:
            return max(logits, forward)
        largest = max(sum(math.prod(shapes[name]) for name in names) for names in self.groups)
        users = {type(use): use.statistic for one in self.methods for use in (one.pruner, one.update)}
        kinds = {kind for one in self.methods for kind in one.statistics if kind in (Hessian, CrossProduct)}
        readers = sum(kind is Hessian for kind in users.values()) + (CrossProduct in kinds)
        squares = sorted(width * width for width in inputs)[-2 if self.first.config["propagate"] == "sequential" else 0 :]
        hessians = (len(kinds) + KEPT * readers) * sum(squares) + SOLVING * max(squares) * bool(kinds)
        tuning = TUNED_BYTES * sum(map(math.prod, shapes.values())) * self.first.method.recovery.is_on
        return max(logits, 4 * hessians + max(4 * WEIGHT_COPIES * largest, forward + tuning))

    def _problems(self) -> list[str]:
        outputs = Path(str(self.first.config["outputs"])).absolute()
        there = next(folder for folder in (outputs, *outputs.parents) if folder.exists())
        host = "runtime=low_memory, which keeps layers and activations on disk"
        if self.runtime.layers == self.runtime.activations == "disk":
            host = "a machine with more memory, or a lower calibration.num_samples"
        rows = (
            ("host memory", self.needed_bytes, self.free_host, host),
            ("device memory", self.device_bytes, self.free_device, "runtime.layers=host runtime.activations=host"),
            (f"disk {there}", self.disk_bytes, shutil.disk_usage(there).free, "outputs to a larger disk"),
        )
        text = "{}: needs {:.1f} GiB, there are {:.1f}; set {}"
        return [text.format(name, need / GIB, free / GIB, remedy) for name, need, free, remedy in rows if need > free]
