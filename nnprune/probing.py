"""What one decoder layer takes on this machine, found by doing with a random one what a run does with each.

Letters: T tokens, I input features.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nnprune.allocations.uniform import Uniform
from nnprune.attention import use_kernel
from nnprune.decoder import Decoder, weight_OI
from nnprune.experiment import Experiment
from nnprune.inputs import PROBE_TOKENS, SAMPLED_TOKENS, InputCollector, input_groups
from nnprune.linears import prune_linears
from nnprune.runtime import forget_peaks, peak_device_bytes, peak_host_bytes, resident_host_bytes
from nnprune.statistics import CrossProduct, Hessian
from nnprune.streams import Stream
from nnprune.survey import stand_in

VOCABULARY = 512

TUNED_ROWS = 4
"""Sequences on which the layer is tuned."""


@dataclass
class Probe:
    """What one decoder layer takes on this machine: seconds and FLOPs of a batch of `num_tokens`, and peaks in bytes."""

    num_tokens: int
    forward_seconds: float
    collect_seconds: float
    prune_seconds: float
    measure_seconds: float
    tune_seconds: float
    forward_flops: float
    statistic_flops: float
    host_bytes: int
    device_bytes: int


def measure_layer(experiment: Experiment, config: Any, seq_len: int) -> Probe:
    """Do with one random layer what a run does with each."""
    runtime, method, device = experiment.runtime, experiment.method, experiment.runtime.torch_device
    model = experiment.source.random(_one_layer(config), experiment.computing_dtype).to(device)
    use_kernel(model, device)
    decoder = Decoder(model, experiment.source.layers_path)
    linears, layer = decoder.linears(0), decoder.layers[0]
    ids = torch.randint(VOCABULARY, (runtime.rows_per_batch(seq_len), seq_len), generator=torch.Generator().manual_seed(0))
    layer_bytes = sum(parameter.nbytes for parameter in layer.parameters())
    before = resident_host_bytes() - layer_bytes
    forget_peaks()
    collect_seconds = prune_seconds = measure_seconds = tune_seconds = 0.0
    with torch.no_grad(), Stream(decoder, runtime, ids, experiment.folder / "activations-probe.bin") as stream:
        hidden = stream.activations.get(slice(0, len(ids)))
        groups = input_groups(linears, lambda: stream.run(0, layer, stream.probe(PROBE_TOKENS)))
        _seconds(lambda: stream.run(0, layer, hidden), device)  # the first call of a kernel is slow
        forward_seconds = _seconds(lambda: stream.run(0, layer, hidden), device)
        if not experiment.is_dense:
            collector = InputCollector(method.statistics, [method.pruner], groups, linears, seq_len)

            def collect() -> None:
                if method.needs_reference:
                    with collector.reference(stop=False):
                        stream.run(0, layer, hidden)
                with collector.rows(slice(0, len(ids))):
                    stream.run(0, layer, hidden)

            with collector.watching(stop=False):
                collect_seconds = _seconds(collect, device)
            collector.finish()
            plan = Uniform().plan(experiment.pattern, decoder.shapes_by_layer())  # one layer can have no other
            prune_seconds = _seconds(
                lambda: prune_linears(method, plan, collector, linears, experiment.source.stored_dtype), device
            )
            if method.recovery.is_on:
                tune_seconds = _tune_seconds(experiment, decoder, seq_len) * ids.numel() / (TUNED_ROWS * seq_len)
            if experiment.allocation.looks_at != "nothing":
                dense = stand_in(linears, SAMPLED_TOKENS)
                measure_seconds = _seconds(lambda: experiment.allocation.measure(dense, experiment.pattern), device)
    widths = [weight_OI(linears[names[0]]).shape[1] for names in groups]
    text = decoder.text_config
    attention = (
        2
        * seq_len
        * text.num_attention_heads
        * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    )
    per_token = 2 * sum(linear.weight.numel() for linear in linears.values()) + attention
    statistic = sum(2 * width * width for width in widths) * len(method.statistics & {Hessian, CrossProduct})
    return Probe(
        num_tokens=ids.numel(),
        forward_seconds=forward_seconds,
        collect_seconds=collect_seconds,
        prune_seconds=prune_seconds,
        measure_seconds=measure_seconds,
        tune_seconds=tune_seconds,
        forward_flops=ids.numel() * per_token,
        statistic_flops=ids.numel() * statistic,
        host_bytes=max(peak_host_bytes() - before, 0),
        device_bytes=peak_device_bytes(),
    )


def _tune_seconds(experiment: Experiment, decoder: Decoder, seq_len: int) -> float:
    """Seconds of an epoch of recovery with TUNED_ROWS sequences."""
    ids = torch.zeros(TUNED_ROWS, seq_len, dtype=torch.int64)
    with Stream(decoder, experiment.runtime, ids, experiment.folder / "activations-tune.bin") as stream:
        hidden = stream.activations

        def tune() -> None:
            layer = copy.deepcopy(decoder.layers[0])
            experiment.method.recovery.tune(0, layer, lambda tuned, batch: stream.run(0, tuned, batch), hidden, hidden, 1)

        return _seconds(tune, experiment.runtime.torch_device)


def _one_layer(config: Any) -> Any:
    """The configuration of a model with one such layer and hardly any shell."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    num_layers = text.num_hidden_layers
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == num_layers:  # such as layer_types
            setattr(text, key, value[:1])
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, VOCABULARY, None
    return config


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
