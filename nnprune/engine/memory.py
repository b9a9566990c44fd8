"""What the device holds at the peak of a run, by arithmetic, and the settings that keep this below the memory that there is.

Letters: D hidden, O output features, I input features, V vocabulary.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.experts import bytes_of_statistics
from nnprune.engine.input_collector import SAMPLED_TOKENS
from nnprune.engine.input_groups import PROBE_TOKENS, layer_groups
from nnprune.engine.logits import LOGIT_BYTES, LOGITS, tokens_of_logits
from nnprune.engine.window import num_kept_states
from nnprune.method import Method
from nnprune.runtime import Runtime
from nnprune.statistics import CrossProduct, Hessian

log = logging.getLogger(__name__)

FETCHED = 3
"""Layers in memory where they come and go: one computes, the next arrives, beside a file or a copy."""

USABLE = 0.9
"""Share of the free memory that can be planned with: the allocator leaves gaps, and libraries have their own workspaces."""

MOST_EXPERTS_OF_A_TOKEN = 8
"""Experts that a token is routed to, in most mixtures at most."""

TUNED_BYTES = 19
"""Of a tuned parameter: itself, its gradient, Adam's two, a 16-bit copy, its mask."""

TUNED_ACTIVATIONS = 5
"""Bytes beside those of its dtype that a step of tuning keeps for each output of a linear and token."""


@dataclass
class Workload:
    """What a run computes, as far as its memory depends on it.

    Args:
        shapes: linear name -> (O, I) of a decoder layer.
        groups: names of those that share an input, in order of use.
        methods: none for a dense run.
        propagate: what later linears see: the `mode` of Propagation.
        itemsize: bytes of a number in the computing dtype.
        hidden_size: D.
        seq_len: tokens of the longest sequence.
        vocab_size: V.
        calibration: tokens of the calibration.
        windows: tokens of all evaluations, of the dense and of the pruned model.
        experts: linear name -> `pool_key`, of those that are experts', which compute one after the other.
        num_layers, num_parameters: of all decoder layers, which distillation holds together.
        absent_parameters: of decoder layers that are in no memory yet.
    """

    shapes: dict[str, tuple[int, int]]
    groups: list[list[str]]
    methods: Sequence[Method]
    propagate: str
    itemsize: int
    hidden_size: int
    seq_len: int
    vocab_size: int
    calibration: int
    windows: int
    experts: dict[str, tuple[str, str]] = field(default_factory=dict)
    num_layers: int = 1
    num_parameters: int = 0
    absent_parameters: int = 0

    def hidden_bytes(self, is_cached: bool = True) -> tuple[int, int]:
        """Hidden states of the calibration, and of the windows. In a sequential run the outputs of linears may be cached beside."""
        outputs = sum(shape[0] for shape in self.shapes.values()) * (self.is_sequential and is_cached)
        copies = (1 + any(method.needs_reference for method in self.methods)) * (1 + self.is_sequential)
        copies += max((num_kept_states(method.recovery, self.propagate) for method in self.methods), default=0)
        copies += any(method.distillation for method in self.methods)
        calibration = self.calibration * (self.hidden_size * copies + outputs)
        return self.itemsize * calibration, self.itemsize * self.windows * self.hidden_size

    def forward_bytes(self, tokens: int, statistics_bytes: float = math.inf) -> int:
        """A batch of `tokens` in a decoder layer, and the statistics that it is added to."""
        inputs = [self.shapes[names[0]][1] for names in self.groups if names[0] in self._computed_together]
        batch = tokens * (self.itemsize * self._num_outputs + 4 * max(inputs))
        kept = tokens * self.itemsize * (max(inputs) if self.is_sequential else sum(inputs))  # for the other model's inputs
        return batch + kept * (CrossProduct in self._kinds) + max(self._sums(statistics_bytes)) + self._sample_bytes()

    def prune_bytes(self, one_by_one: bool, statistics_bytes: float = math.inf) -> int:
        """Statistics, factorisations and weights while the linears of a group are pruned, together or one by one."""
        most, kept = 0, 0
        for names, sums in zip(self.groups, self._sums(statistics_bytes), strict=True):
            width, outputs = self.shapes[names[0]][1], [self.shapes[name][0] for name in names]
            num_outputs = max(outputs) if one_by_one else sum(outputs)
            for method in self.methods:
                pruner, update, target = method.pruner, method.update, method.target
                matrices = pruner.matrix_copies * bool(sums) + update.matrix_copies + target.matrix_copies
                weights = max(pruner.weight_copies, update.weight_copies) + target.weight_copies
                most = max(most, sums + kept + 4 * width * (width * matrices + num_outputs * weights))
                kept += 4 * width * width * matrices * (len(self.methods) > 1)  # a grid keeps them for its other cells
        return most + self._sample_bytes()

    def tune_bytes(self, runtime: Runtime) -> int:
        """Block-wise reconstruction of the decoder layers of a window, with a step's activations, and some logits."""
        recoveries = [method.recovery for method in self.methods if method.recovery.is_on]
        tokens = max((max(one.batch_tokens, self.seq_len) for one in recoveries), default=0)
        activations = (TUNED_ACTIVATIONS + self.itemsize) * tokens * self._num_outputs
        logits = any(one.logits_epochs for one in recoveries) * self._logit_bytes(tokens, runtime)
        return bool(recoveries) * self._window * (TUNED_BYTES * self._num_weights + activations) + logits

    def distill_bytes(self, runtime: Runtime) -> int:
        """Distillation: the weights of all decoder layers, what tuning holds of them, and a step's activations, of which the inputs of
        all layers are kept, and the logits; 0 without."""
        found = [method.distillation for method in self.methods if method.distillation]
        tokens = max((max(one.batch_tokens, self.seq_len) for one in found), default=0)
        activations = 4 * self.hidden_size * (self.num_layers + 2) + (TUNED_ACTIVATIONS + self.itemsize) * self._num_outputs
        held = (TUNED_BYTES + self.itemsize) * self.num_parameters
        return bool(found) * (held + tokens * activations + self._logit_bytes(tokens, runtime))

    def _logit_bytes(self, tokens: int, runtime: Runtime) -> int:
        """Logits that are compared at a time, of a step of so many tokens."""
        return LOGIT_BYTES * min(LOGITS[runtime.torch_device.type], tokens * self.vocab_size)

    def workspace_bytes(self, runtime: Runtime) -> int:
        """What computing takes at most, beside weights and hidden states."""
        tokens = runtime.rows_per_batch(self.seq_len) * self.seq_len
        logits = bool(self.windows) * (self.itemsize + 8) * self.vocab_size
        logits *= tokens_of_logits(runtime.torch_device, self.seq_len, self.vocab_size)
        pruning = self.prune_bytes(runtime.one_by_one, runtime.statistics_bytes)
        tuning = max(self.tune_bytes(runtime), self.distill_bytes(runtime))
        return max(self.forward_bytes(tokens, runtime.statistics_bytes), pruning, tuning, logits)

    def _sample_bytes(self) -> int:
        """Inputs on which errors are measured, and those of a group in float32."""
        widths = {names[0]: self.shapes[names[0]][1] for names in self.groups}
        sizes = Counter(
            self.experts.get(name) for name in widths
        )  # experts of a mixture share out the tokens that all of them receive
        shares = {key: min(1, MOST_EXPERTS_OF_A_TOKEN / size) for key, size in sizes.items() if key}
        tokens = {key: share * max(SAMPLED_TOKENS, self.seq_len) for key, share in shares.items()}
        kept = [int(width * tokens.get(self.experts.get(name), SAMPLED_TOKENS)) for name, width in widths.items()]
        return self.itemsize * (max(kept) if self.is_sequential else sum(kept)) + 4 * max(kept)

    def fetched_bytes(self, runtime: Runtime) -> int:
        """Weights of decoder layers that come to those on the device."""
        if runtime.layers == "device":
            return self.itemsize * (self.absent_parameters + (self._window - 1) * self._num_weights)
        return self.fetched_layers * self.itemsize * self._num_weights

    @property
    def fetched_layers(self) -> int:
        """Layers on the device where they come and go; those of a window stay until they are final, with copies for the layer files."""
        return FETCHED + 2 * (self._window - 1)

    @property
    def _window(self) -> int:
        return max((method.recovery.num_layers for method in self.methods), default=1)

    @property
    def is_sequential(self) -> bool:
        """Whether groups are pruned one after the other, each from its own forwards."""
        return self.propagate == "sequential"

    @property
    def _num_weights(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def _kinds(self) -> set[type]:
        return {kind for method in self.methods for kind in method.statistics if kind in (Hessian, CrossProduct)}

    @property
    def _computed_together(self) -> list[str]:
        """All linears but those of further experts, which compute when an earlier one has done so."""
        first = {key: name for name, key in reversed(self.experts.items())}
        return [name for name in self.shapes if first.get(self.experts.get(name), name) == name]

    @property
    def _num_outputs(self) -> int:
        return sum(self.shapes[name][0] for name in self._computed_together)

    def largest_sum(self) -> int:
        """The statistics of one group."""
        return max((bytes_of_statistics(self._kinds, self.shapes[names[0]][1]) for names in self.groups), default=0)

    def _sums(self, most: float) -> list[int]:
        """Statistics alive when each group is pruned: its own, and those of groups pruned later, or of all in a grid; those of several
        passes over the layer, each with statistics of at most so many bytes, are not alive together."""
        own = {names[0]: bytes_of_statistics(self._kinds, self.shapes[names[0]][1]) for names in self.groups}
        keys = {name: self.experts.get(name, name) if self.is_sequential else None for name in own}
        places = list(own) if len(self.methods) == 1 or self.is_sequential else list(own)[:1] * len(own)
        alive = ([one for one in list(own)[list(own).index(name) :] if keys[one] == keys[name]] for name in places)
        sums = [sum(own[one] for one in together) for together in alive]
        return [int(min(total, max(most, own[name]))) for name, total in zip(places, sums, strict=True)]


def fit_device(runtime: Runtime, load: Workload, free: float) -> bool:
    """Set in `runtime` where hidden states are kept, the tokens of a batch and how linears are pruned so that `load` takes no more than
    `free` bytes of the device, and log what was chosen. Returns whether it fits.

    Hidden states go to the host first, which costs least; then the part that does not fit is made smaller.
    """
    before, usable = (runtime.activations, runtime.batch_tokens), USABLE * free
    hidden = sum(load.hidden_bytes())
    base = load.fetched_bytes(runtime)
    if runtime.activations == "auto" and base + hidden + load.workspace_bytes(runtime) > usable:
        runtime.activations = "host"
    room = usable - base - hidden * (runtime.activations == "device")
    least = load.largest_sum() if len(load.methods) == 1 else math.inf
    while (rows := runtime.rows_per_batch(load.seq_len)) > 1 and load.forward_bytes(rows * load.seq_len, least) > room:
        runtime.batch_tokens = rows // 2 * load.seq_len
    together, alone = load.prune_bytes(one_by_one=False), load.prune_bytes(one_by_one=True)
    runtime.one_by_one = together > max(room, alone)
    if len(load.methods) == 1 and load.workspace_bytes(runtime) > room:
        runtime.statistics_bytes = least  # to see what else there is room for
        runtime.statistics_bytes += max(room - load.workspace_bytes(runtime), 0)
    runtime.reserved_bytes = base + load.workspace_bytes(runtime)
    if runtime.device_memory is not None or runtime.one_by_one or before != (runtime.activations, runtime.batch_tokens):
        memory = (runtime.device_memory_bytes or free) / 2**30
        tokens = runtime.rows_per_batch(load.seq_len) * load.seq_len
        place = {"host": "in host memory", "disk": "on disk"}.get(runtime.activations, "on the device")
        text = "device memory %.1f GiB: batches of %d tokens, hidden states %s%s"
        log.info(text, memory, tokens, place, ", one linear at a time" if runtime.one_by_one else "")
    return load.workspace_bytes(runtime) <= room + free - usable  # what cannot be planned with may yet be enough


@torch.no_grad()
def groups_of(engine: LayerwiseEngine) -> list[list[str]]:
    """Names of the linears of the largest decoder layer that share an input."""
    index = engine.decoder.largest
    with engine.hidden_states(torch.zeros(1, PROBE_TOKENS, dtype=torch.int64), "probe") as states:
        groups = layer_groups(states, index, engine.store.fetch(index, pruned=False))
    if index:  # the first one is needed next
        engine.store.release(index)
    return groups
