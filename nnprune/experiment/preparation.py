"""What a run is prepared from its checked settings: skeleton, token ids and engine."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnprune.allocations.base import Allocation, Shapes
from nnprune.allocations.uniform import Uniform
from nnprune.calibration import Calibration
from nnprune.engine import parallel
from nnprune.engine.distillation import DistillationPass
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.experts import Routing, pool_key
from nnprune.engine.input_collector import rows_needed
from nnprune.engine.input_groups import PROBE_TOKENS
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.layer_store import LayerStore
from nnprune.engine.memory import Workload, fit_device, groups_of
from nnprune.engine.stopwatch import Stopwatch
from nnprune.experiment.build import Experiment
from nnprune.method import Method
from nnprune.model.attention import use_kernel
from nnprune.model.decoder import Decoder
from nnprune.model.dtypes import name_of
from nnprune.model.left_alone import SHARED
from nnprune.runtime import available_host_bytes, resident_host_bytes
from nnprune.texts import check_ids

log = logging.getLogger(__name__)

DEFAULT_POSITIONS = 2048  # of models without a limit

SCRATCH = "unfinished"
"""Subfolder of a run's folder for what a resumed run needs, such as layer files; removed once the record is written."""


def warn_of_demo_texts(experiment: Experiment) -> None:
    """Warn of a real model on the demo's texts, which `model.path=org/name` without `model=hub` gets by default."""
    if experiment.config["model"]["path"] != "demo" and "demo" in experiment.evaluation.evaluators:
        log.warning(
            "warning: evaluation=demo measures a real model on the demo's text; model=hub or model=local has better defaults"
        )


def log_computing_dtype(experiment: Experiment) -> None:
    """Log the computing dtype if it is not the checkpoint's."""
    stored, computing = name_of(experiment.source.stored_dtype), name_of(experiment.computing_dtype)
    if computing != stored:
        device = experiment.runtime.torch_device.type.replace("cpu", "CPU").replace("cuda", "CUDA device")
        log.info("computing in %s: this %s has no units for the checkpoint's %s", computing, device, stored)


def skeleton(experiment: Experiment, config: Any) -> Decoder:
    """The model without its weights. Raises ValueError if its files do not suit `runtime.layers`."""
    source = experiment.source
    model = source.skeleton(config)
    source.check(model, experiment.runtime.layers)
    return Decoder(model, source.layers_path)


def check_shapes(experiment: Experiment, decoder: Decoder) -> None:
    """Raise ValueError for sequences longer than the model's positions, windows of more layers than it has, tuning of shared layers, and
    patterns that do not fit its linears or the pruner."""
    positions = getattr(decoder.text_config, "max_position_embeddings", None)
    lengths = [("calibration.seq_len", 0 if experiment.is_dense else experiment.calibration.seq_len)]
    lengths += [(one.length_key, one.seq_len or 0) for one in experiment.evaluation.evaluators.values()]
    for key, length in lengths:
        if positions and length > positions:
            raise ValueError(f"{key}={length}: {experiment.source.name} has {positions} positions; lower {key}")
    window, num_layers = experiment.method.recovery.num_layers, len(decoder.layers)
    if window > num_layers and not experiment.is_dense:
        key = "recover.layers.num_layers" if experiment.method.distillation else "recover.num_layers"
        raise ValueError(f"{key}={window}: {experiment.source.name} has {num_layers} decoder layers; set no more")
    if SHARED in decoder.left_alone.values() and (experiment.method.recovery.is_on or experiment.method.distillation):
        reason = "has weights that several decoder layers share, which tuning would change for some"
        raise ValueError(f"recover: {experiment.source.name} {reason}; set recover=none")
    allocation: Allocation = Uniform()
    shapes: Shapes = decoder.shapes_by_layer()
    if not experiment.is_dense:
        allocation, shapes = experiment.allocation, experiment.selection.cut(shapes)
    for pattern in sorted(allocation.check(experiment.pattern, shapes), key=str):
        experiment.method.pruner.validate(pattern)


def chosen_linears(experiment: Experiment, decoder: Decoder, like: Decoder | None = None) -> set[str]:
    """The full names of the linears that are pruned. `like`: those of a decoder with fewer of the same layers, each chosen if it is in
    any layer."""
    chosen = {name for layer in experiment.selection.cut(decoder.shapes_by_layer()) for name in layer}
    if like is None:
        return chosen
    start = f"{decoder.path}.".count(".")  # of the part of a name that is the layer's number
    within = {tuple(name.split(".")[start + 1 :]) for name in chosen}
    return {name for name in like.shapes() if tuple(name.split(".")[start + 1 :]) in within}


def token_ids(experiment: Experiment, config: Any, tokenizer: Any) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Calibration ids (N, T), with N = 0 for a dense run, and the rows (N, T) of each length by fingerprint of the evaluation; int64.
    Evaluators that load the model themselves are left out."""
    text_config = config.get_text_config()
    vocab_size, evaluation = text_config.vocab_size, {}
    for name, key in experiment.evaluations.items():
        evaluator = experiment.evaluation.evaluators[name]
        if evaluator.loads_model and not (experiment.is_dense or experiment.config["save"]):
            raise ValueError(f"save=false: {name} is measured on the saved model with evaluation.backend=hf; set save=true")
        if evaluator.seq_len is None:
            evaluator.seq_len = getattr(text_config, "max_position_embeddings", None) or DEFAULT_POSITIONS
        rows = evaluator.prepare(tokenizer)
        if not evaluator.loads_model:
            evaluation[key] = [rows] if isinstance(rows, Tensor) else rows
            for ids in evaluation[key]:
                check_ids(f"evaluation: {name}", ids, vocab_size)
    if experiment.is_dense:
        return torch.empty(0, experiment.calibration.seq_len, dtype=torch.int64), evaluation
    return experiment.calibration.token_ids(tokenizer, vocab_size), evaluation


def workload(
    experiment: Experiment,
    decoder: Decoder,
    groups: list[list[str]],
    methods: Sequence[Method],
    calibration: Tensor,
    windows: Sequence[Tensor],
    num_measured: int = 2,
) -> Workload:
    """What pruning with `methods` computes for ids (N, T) of the calibration and of each evaluation, whose windows `num_measured` models
    run."""
    weights = decoder.weights(decoder.largest)
    if experiment.is_dense:
        methods = []
    else:
        chosen = chosen_linears(experiment, decoder, like=decoder)
        groups = [kept for names in groups if (kept := [name for name in names if name in chosen])]
    pruned_on = rows_needed(methods, calibration)
    distills = any(method.distillation for method in methods)
    calibration = max(pruned_on, calibration, key=len) if distills else pruned_on
    return Workload(
        shapes={name: weight.shape for name, weight in weights.items()},
        groups=groups,
        methods=methods,
        propagate=experiment.config["propagate"],
        itemsize=experiment.computing_dtype.itemsize,
        hidden_size=decoder.text_config.hidden_size,
        seq_len=max((rows.shape[1] for rows in (calibration, *windows) if len(rows)), default=PROBE_TOKENS),
        vocab_size=decoder.vocab_size,
        calibration=calibration.numel(),
        windows=num_measured * sum(map(torch.numel, windows)),
        experts={name: pool_key(weight.expert) for name, weight in weights.items() if weight.expert},
        num_layers=len(decoder.layers),
        num_parameters=sum(map(torch.numel, decoder.layers.parameters())),
        absent_parameters=sum(one.numel() for one in decoder.layers.parameters() if one.is_meta),
    )


def fit_memory(
    experiment: Experiment, engine: LayerwiseEngine, methods: Sequence[Method], calibration: Tensor, windows: Sequence[Tensor]
) -> None:
    """Choose what a limited device has room for. Raises ValueError if it cannot hold what pruning with `methods` takes, for ids (N, T) of
    the calibration and of each evaluation."""
    runtime, free = experiment.runtime, experiment.runtime.free_device_bytes()
    is_host, distills = math.isinf(free), any(method.distillation for method in methods) and not experiment.is_dense
    if is_host and not distills:
        return
    load = workload(experiment, engine.decoder, [] if is_host else groups_of(engine), methods, calibration, windows)
    if distills:
        room = available_host_bytes() - resident_host_bytes() if is_host else free
        need = load.distill_bytes(runtime) + is_host * sum(load.hidden_bytes())
        if need > room:
            raise ValueError(
                f"recover=model: tunes the whole model at once, which needs {need / 2**30:.1f} GiB of "
                f"{'host' if is_host else 'device'} memory, there are {max(room, 0) / 2**30:.1f}; set recover=layer, which tunes one "
                "decoder layer at a time, or use a larger machine"
            )
    if not is_host and not fit_device(runtime, load, free):
        needed = (load.fetched_bytes(runtime) + load.workspace_bytes(runtime)) / 2**30
        limit = "null" if runtime.device_memory is None else runtime.device_memory
        raise ValueError(
            f"runtime.device_memory={limit}: needs {needed:.1f} GiB beside embeddings and head, there are {free / 2**30:.1f}; "
            "use a larger device, a cheaper pruner, runtime.layers=host or a shorter calibration.seq_len"
        )


def open_engine(experiment: Experiment, decoder: Decoder) -> LayerwiseEngine:
    """The model of a skeleton, whose decoder layers are read when they are first fetched. If its checkpoint cannot be read so, the
    model is loaded in place of the skeleton."""
    source, runtime = experiment.source, experiment.runtime
    checkpoint = source.checkpoint(decoder.model) if source.files.is_safetensors else None
    if checkpoint is None or (runtime.layers != "disk" and not checkpoint.can_read()):
        decoder, checkpoint = Decoder(source.load(source.config()), source.layers_path), None
    use_kernel(decoder.model, runtime.torch_device)
    interval = 0 if experiment.config["save"] else runtime.seconds_unsaved
    layer_files = LayerFiles(experiment.folder / SCRATCH, decoder.path, interval)
    store = LayerStore(decoder, runtime.torch_device, runtime.layers, layer_files, checkpoint, experiment.computing_dtype)
    scratch = experiment.folder / SCRATCH / f"rank-{parallel.rank()}" if parallel.rank() else experiment.folder
    return LayerwiseEngine(decoder, store, runtime, scratch, routing(experiment.calibration))


def distilling_pass(experiment: Experiment, engine: LayerwiseEngine, stopwatch: Stopwatch) -> DistillationPass | None:
    """What tunes the pruned model as a whole, if anything does. Its layers are written as soon as all are finished, if ever."""
    if experiment.method.distillation is None:
        return None
    is_written = experiment.config["save"] or math.isfinite(experiment.runtime.seconds_unsaved)
    files = LayerFiles(experiment.folder / SCRATCH / "distilled", engine.decoder.path, 0 if is_written else math.inf)
    return DistillationPass(engine, experiment.method.distillation, files, stopwatch)


def routing(calibration: Calibration) -> Routing:
    """Which tokens experts are calibrated with."""
    return Routing(calibration.min_tokens_per_expert, shows_all=calibration.route == "all")
