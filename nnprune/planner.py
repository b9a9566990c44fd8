"""What a run will take, before it is started: `plan=true`.

One decoder layer of the model's shape, with random weights, goes through the engine's own code on this machine: a forward, a
forward that collects statistics, the pruning of its linears. The run is predicted from that and from what there is to do.

Letters: N samples, T tokens, L decoder layers, D hidden, V vocabulary, I input features.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from nnprune.experiment import Experiment
from nnprune.inputs import rows_needed
from nnprune.job import check_shapes, skeleton, token_ids
from nnprune.loading import quieten_transformers
from nnprune.probing import measure_layer
from nnprune.records import read_completed
from nnprune.runtime import available_host_bytes, resident_host_bytes
from nnprune.streams import tokens_of_logits

LOGIT_BYTES = 10
"""Of a logit while it is measured: in bfloat16, in float32, and its log-softmax; less where a kernel reads it as it is."""

REPEATED_SHARE = 0.3
"""Of a forward's seconds, what sequential propagation takes for norms and the like that it computes again behind each group of linears,
where the outputs of linears are kept; measured on SmolLM2."""
GIB = 1 << 30


@dataclass
class Stage:
    """One line of a plan."""

    name: str
    flops: float
    seconds: float


class Plan:
    """The prediction of one run: `stages`, peaks in bytes, and `problems`: what does not fit, with the setting that would."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.runtime = experiment.runtime
        quieten_transformers()
        self.runtime.start(experiment.config["seed"])
        config, tokenizer = experiment.source.config(), experiment.source.tokenizer()
        self.decoder = skeleton(experiment, config)
        check_shapes(experiment, self.decoder)
        self.calibration, evaluation = token_ids(experiment, config, tokenizer)
        self.evaluation = list(evaluation.values())
        self.measures_dense = not experiment.is_dense and read_completed(experiment.dense().folder) is None
        base = resident_host_bytes()
        self.probe = measure_layer(experiment, config, max(ids.shape[1] for ids in (self.calibration, *self.evaluation)))
        self.stages = self._stages()
        self.host_bytes, self.device_bytes, self.disk_bytes = self._bytes(base)
        self.problems = self._problems()

    def lines(self) -> list[str]:
        """The plan as text."""
        total = Stage("total", sum(stage.flops for stage in self.stages), sum(stage.seconds for stage in self.stages))
        rows = [f"{'stage':<18}{'TFLOP':>12}{'seconds':>10}"]
        rows += [f"{stage.name:<18}{stage.flops / 1e12:>12.3f}{stage.seconds:>10.1f}" for stage in (*self.stages, total)]
        device = f", device {self.device_bytes / GIB:.2f} GiB" if self.device_bytes else ""
        return [*rows, f"peak: host {self.host_bytes / GIB:.2f} GiB{device}; disk {self.disk_bytes / GIB:.2f} GiB"]

    def _stages(self) -> list[Stage]:
        experiment, probe, num_layers = self.experiment, self.probe, len(self.decoder.layers)
        measured = self._evaluation_stage()
        if experiment.is_dense:
            return [Stage("dense_evaluation", *measured)]
        rows = rows_needed([experiment.method], self.calibration)
        batches = num_layers * rows.numel() / probe.num_tokens
        # Sequentially what lies between two groups is computed once more for each group behind it, linears only if not kept.
        keeps = self.runtime.activations != "disk" and self.runtime.torch_device.type == "cpu"
        sequential = (1, 0, REPEATED_SHARE) if keeps else (2, 1, 0)
        modes = {"pruned": (1, 1, 0), "dense": (1, 0, 0), "sequential": sequential}
        collects, forwards, repeated = modes[experiment.config["propagate"]]
        streams = 1 + experiment.method.needs_reference
        stages = [
            Stage(
                "calibration",
                batches * ((collects * streams + forwards) * probe.forward_flops + probe.statistic_flops),
                batches * (collects * probe.collect_seconds + (forwards + repeated) * probe.forward_seconds),
            ),
            Stage("prune", 0.0, num_layers * probe.prune_seconds),
            Stage("evaluation", *measured),
        ]
        if experiment.method.recovery.is_on:
            recovery = experiment.method.recovery
            passes = batches * (recovery.epochs_before + recovery.epochs_after)
            # Backwards costs two forwards.
            stages.insert(1, Stage("recover", 3 * passes * probe.forward_flops, passes * probe.tune_seconds))
        if self.measures_dense:
            stages.insert(0, Stage("dense_evaluation", *measured))
        if experiment.allocation.looks_at != "nothing":
            stages.insert(0, self._survey_stage())
        return stages

    def _survey_stage(self) -> Stage:
        """The look at the dense model that an allocation takes."""
        probe, num_layers = self.probe, len(self.decoder.layers)
        num_tokens = self.calibration.numel() if self.experiment.allocation.looks_at == "inputs" else 0
        batches = num_layers * num_tokens / probe.num_tokens
        seconds = batches * probe.forward_seconds + num_layers * probe.measure_seconds
        return Stage("allocation", batches * probe.forward_flops, seconds)

    def _evaluation_stage(self) -> tuple[float, float]:
        """FLOPs and seconds of taking all windows through the layers and the head."""
        probe = self.probe
        num_tokens = sum(ids.numel() for ids in self.evaluation)
        batches = len(self.decoder.layers) * num_tokens / probe.num_tokens
        head = 2 * num_tokens * self.decoder.vocab_size * self.decoder.text_config.hidden_size
        rate = probe.forward_flops / probe.forward_seconds
        return batches * probe.forward_flops + head, batches * probe.forward_seconds + head / rate

    def _bytes(self, base: int) -> tuple[int, int, int]:
        """Peak of the host, peak of the device, and largest size on disk."""
        runtime, probe, decoder = self.runtime, self.probe, self.decoder
        inside = set(decoder.layers.parameters())
        layer = sum(parameter.nbytes for parameter in decoder.layers[0].parameters())
        layers = sum(parameter.nbytes for parameter in inside)
        shell = sum(parameter.nbytes for parameter in decoder.model.parameters() if parameter not in inside)
        num_evaluations = (1 + self.measures_dense) * sum(ids.numel() for ids in self.evaluation)
        width = decoder.text_config.hidden_size * decoder.model.dtype.itemsize
        sequential = self.experiment.config["propagate"] == "sequential"
        # Cached inputs of the last linear of the attention take as much again. Outputs, cached only where there is room, do not count.
        streams = (1 + self.experiment.method.needs_reference) * (1 + sequential)
        activations = (num_evaluations + (0 if self.experiment.is_dense else self.calibration.numel() * streams)) * width
        window = max((ids.shape[1] for ids in self.evaluation), default=0)
        logits = LOGIT_BYTES * tokens_of_logits(runtime.torch_device, window, decoder.vocab_size) * decoder.vocab_size
        on_disk = (0 if self.experiment.is_dense else layers) + shell * self.experiment.config["save"]
        at_rest = {"host": 0, "device": 0, "disk": on_disk}
        on_cuda = runtime.torch_device.type == "cuda"
        at_rest["device" if runtime.activations == "auto" and on_cuda else runtime.activations.replace("auto", "host")] += (
            activations
        )
        if runtime.layers != "disk":
            at_rest[runtime.layers] += layers
        if not on_cuda:
            one_more = layer if runtime.layers == "disk" else -layer  # brought ahead; or the probe's own is one of them
            one_more += layer * (sequential and self.experiment.method.needs_reference)  # the dense one beside it
            return base + at_rest["host"] + at_rest["device"] + shell + logits + probe.host_bytes + one_more, 0, at_rest["disk"]
        host = base + probe.host_bytes + at_rest["host"] + shell
        return host, probe.device_bytes + at_rest["device"] + shell + logits + layer, at_rest["disk"]

    def _problems(self) -> list[str]:
        problems = []
        runtime, outputs = self.runtime, Path(str(self.experiment.config["outputs"])).absolute()
        there = next(folder for folder in (outputs, *outputs.parents) if folder.exists())
        if self.host_bytes > (free := available_host_bytes()):
            remedy = "a machine with more memory, or a lower calibration.num_samples"
            if runtime.layers != "disk" or runtime.activations != "disk":
                remedy = "runtime=low_memory, which keeps layers and activations on disk"
            problems.append(f"host memory: needs {self.host_bytes / GIB:.1f} GiB, there are {free / GIB:.1f}; set {remedy}")
        if self.device_bytes and self.device_bytes > (free := torch.cuda.mem_get_info(runtime.torch_device)[0]):
            remedy = "runtime.layers=host runtime.activations=host, or a lower runtime.batch_tokens"
            problems.append(f"device memory: needs {self.device_bytes / GIB:.1f} GiB, there are {free / GIB:.1f}; set {remedy}")
        if self.disk_bytes > (free := shutil.disk_usage(there).free):
            problems.append(
                f"disk: needs {self.disk_bytes / GIB:.1f} GiB, {there} has {free / GIB:.1f}; set outputs to a larger disk"
            )
        return problems
