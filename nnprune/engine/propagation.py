"""Takes the calibration through the decoder layers, and collects the inputs of their linears.

The calibration passes through the layers that `propagate` chooses. For methods that compare with the dense model, the same tokens
also pass through the dense layers: the reference.

Letters: N samples, B batch, T tokens, D hidden.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from nnprune.engine.cached_outputs import CachedOutputs, find_parts
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.experts import bytes_of_statistics, pool_key
from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.input_collector import InputCollector
from nnprune.engine.input_groups import PROBE_TOKENS, layer_groups
from nnprune.engine.stopwatch import Stopwatch
from nnprune.engine.window import Window
from nnprune.method import Method
from nnprune.model.weight_views import weight_views

PROPAGATE = ("pruned", "dense", "sequential")


@dataclass(eq=False)
class Propagation:
    """The hidden states of the calibration, at the input of one decoder layer after another.

    Args:
        engine: the model and its layers.
        mode: what later linears see. pruned: outputs of pruned layers; dense: of dense layers; sequential: of pruned layers,
            and within a layer of the linears already pruned.
        calibration: hidden states of the calibration.
        reference: hidden states of the dense model, if a method needs them.
        window: the layers before it that are not final.
        stopwatch: times the forwards.
    """

    engine: LayerwiseEngine
    mode: str
    calibration: HiddenStates
    reference: HiddenStates | None
    window: Window
    stopwatch: Stopwatch
    _next_collector: InputCollector | None = None  # inputs of the next layer's linears, if already collected
    _next_passes: list[list[list[str]]] = field(default_factory=list)  # over the next layer, the first of them done
    _reference_advanced: bool = False  # the reference has passed through the current layer, the calibration has not
    _cached: dict[nn.Module, CachedOutputs] = field(default_factory=dict)  # of the current layer, and of its dense copy

    def skip(self, index: int) -> None:
        """Take calibration and reference through decoder layer `index`, which is finished."""
        with self.stopwatch.stage("calibration"):
            if self.reference is not None:
                self.reference.advance(index, self.engine.store.fetch(index, pruned=False))
            self.calibration.advance(index, self.engine.store.fetch(index, pruned=self.mode != "dense"))

    def restore(self, index: int, state: dict[str, Tensor]) -> None:
        """Take calibration and reference through decoder layer `index`, whose weights are to be `state`, though it is not final."""
        with self.stopwatch.stage("calibration"):
            layer = self.engine.store.fetch(index, pruned=False)
            self.reference.advance(index, layer)
            if self.mode == "dense":
                self.calibration.advance(index, layer)
            for name, tensor in layer.state_dict().items():
                tensor.copy_(state[name])
            if self.mode != "dense":
                self.calibration.advance(index, layer)

    def advance_reference(self, index: int, layer: nn.Module) -> None:
        """Take the reference through the dense decoder layer `index` before the inputs of its linears are collected.

        Targets then compare the calibration in the pruned layer with the calibration in the dense one.
        """
        self.reference.advance(index, layer)
        self._reference_advanced = True

    def collectors(self, index: int, layer: nn.Module, methods: Sequence[Method], hand_on: bool) -> Iterator[InputCollector]:
        """The inputs of the linears of decoder layer `index`: of all at once or, in sequential mode, of one group at a time, which
        the caller prunes before it asks for the next.

        Afterwards the reference has passed through this layer and, in dense mode with `hand_on`, so has the calibration.
        """
        passes, dense = self._next_passes or self._passes(index, layer, methods), layer
        self._next_passes, is_dense = [], self.mode == "dense"
        if not passes:  # no linear of this layer is chosen
            with self.stopwatch.stage("calibration"):
                self._pass_by(index, layer, hand_on and is_dense)
            return
        if self.mode == "sequential":
            if any(method.pairs_inputs for method in methods) or (self.reference and not self._reference_advanced):
                dense = copy.deepcopy(layer)
            self._start_caching(index, layer, dense)
        elif len(passes) > 1 and (is_dense or self.reference is not None):
            dense = copy.deepcopy(layer)
        for seen in passes:
            collector, self._next_collector = self._next_collector, None
            if collector is None:
                with self.stopwatch.stage("calibration"):
                    hands_on = hand_on and is_dense and len(passes) == 1
                    collector = self._collect(index, layer, dense, methods, seen, passes, hands_on)
            collector.finish()
            yield collector
        if hand_on and is_dense and len(passes) > 1:
            with self.stopwatch.stage("calibration"):
                self.calibration.advance(index, dense)
        self._reference_advanced = False

    def _pass_by(self, index: int, layer: nn.Module, hand_on: bool) -> None:
        """Take the reference, and with `hand_on` the calibration, through a layer none of whose inputs is collected."""
        if self.reference is not None and not self._reference_advanced:
            self.reference.advance(index, layer)
        if hand_on:
            self.calibration.advance(index, layer)
        self._reference_advanced = False

    def invalidate(self) -> None:
        """Drop cached outputs: the weights of the current layer have changed, or the layer is done."""
        for cached in self._cached.values():
            cached.close()
        self._cached = {}

    def hand_on(self, index: int, methods: Sequence[Method]) -> None:
        """Take the calibration through the pruned decoder layer `index`, and through those before it that were tuned with it.

        If `methods` prune the next layer without tuning it first, the same batches continue through that layer to collect the
        inputs of its linears, so that hidden states are read once per layer.
        """
        with self.stopwatch.stage("calibration"):
            if self.window.reports:
                self.window.hand_on()
                self.invalidate()
                return
            layer = self.engine.store.fetch(index)
            collects = methods and self.engine.decoder.weights(index + 1)
            if self.mode == "sequential" or not collects or any(method.recovery.epochs_before for method in methods):
                with self._replaying(layer, (), is_last=True):
                    self.calibration.advance(index, layer)
                self.invalidate()
                return
            with self.stopwatch.stage("load"):
                following = self.engine.store.fetch(index + 1, pruned=False)
            passes = self._next_passes = self._passes(index + 1, following, methods)
            before = (index, layer)
            self._next_collector = self._collect(index + 1, following, following, methods, passes[0], passes, before=before)

    def _collect(
        self,
        index: int,
        layer: nn.Module,
        dense: nn.Module,
        methods: Sequence[Method],
        groups: list[list[str]],
        passes: list[list[list[str]]],
        hand_on: bool = False,
        before: tuple[int, nn.Module] | None = None,
    ) -> InputCollector:
        """Collect the inputs of `groups` of linears, one of the `passes` over layer `index`, for the whole calibration.

        With `hand_on` the calibration is replaced by the outputs of `layer`; with `before`, a layer that it passes through first,
        by the outputs of that one. The last pass over a layer takes the reference through `dense`, unless that is done already.
        """
        weights = self.engine.decoder.weights(index)
        hidden_size = self.calibration.activations.tensor.shape[-1]
        dense_weights = weight_views(dense, self._prefix(index), hidden_size) if dense is not layer else None
        kinds = set().union(*(method.statistics for method in methods))
        pruners = [method.pruner for method in methods]
        seq_len, first_row = self.calibration.shape[1], self.calibration.share.start
        is_last = groups is passes[-1]
        shared = {pool_key(expert) for names in groups if (expert := weights[names[0]].expert)}
        leaders = (names[0] for one in passes if one is not groups for names in one)
        others = [name for name in leaders if (expert := weights[name].expert) and pool_key(expert) in shared]
        routing = self.engine.routing
        collector = InputCollector(kinds, pruners, groups, weights, seq_len, dense_weights, first_row, routing, others)
        advances = self.reference is not None and not self._reference_advanced and is_last
        needs_reference = collector.pairs or advances
        run = self.calibration.run

        def step(rows: slice, hidden: Tensor) -> Tensor | None:
            if before is not None:
                hidden = run(*before, hidden)
            if needs_reference:
                dense_hidden = hidden if self._reference_advanced else self.reference.activations.get(rows)
                reference = collector.run_reference(lambda: run(index, dense, dense_hidden), stop=not advances)
            output = collector.run(rows, lambda: run(index, layer, hidden))
            if advances:  # only now: a batch that ran out of memory is repeated from the start
                self.reference.activations.put(rows, reference)
            return output if hand_on else hidden if before is not None else None

        seen = [name for names in groups for name in names]
        dense_replaying = self._replaying(dense, seen, is_last) if dense is not layer else nullcontext()
        with collector.observing(stop=not hand_on), self._replaying(layer, seen, is_last=False), dense_replaying:
            self.calibration.each_batch(step, collector.split)
        return collector

    def _passes(self, index: int, layer: nn.Module, methods: Sequence[Method]) -> list[list[list[str]]]:
        """The groups of linears of layer `index` whose inputs are collected together.

        All at once, or as many as have room for their statistics, those that are used last first: what they receive depends on
        none that is pruned before. In sequential mode one after the other, but the same part of all experts of a mixture together.
        """
        groups = layer_groups(self.calibration, index, layer)
        weights = self.engine.decoder.weights(index)
        kinds = set().union(*(method.statistics for method in methods))
        together: dict[object, list[list[str]]] = {}
        for names in groups:
            expert = weights[names[0]].expert
            key = (pool_key(expert) if expert else names[0]) if self.mode == "sequential" else None
            together.setdefault(key, []).append(names)
        room = self.engine.runtime.statistics_bytes
        passes: list[list[list[str]]] = []
        for members in together.values():
            left = -1.0
            for names in members:
                size = bytes_of_statistics(kinds, weights[names[0]].shape[1])
                if left < size:
                    passes.append([])
                    left = room
                passes[-1].append(names)
                left -= size
        return passes if self.mode == "sequential" else passes[::-1]

    def _start_caching(self, index: int, layer: nn.Module, dense: nn.Module) -> None:
        """Start to cache outputs of a layer, and of its dense copy if there is one."""
        hidden, prefix = self.calibration.probe(PROBE_TOKENS), self._prefix(index)
        modules = {module: dict(module.named_modules(prefix=prefix)) for module in (dense, layer)}
        linears = [name for name in self.engine.decoder.weights(index) if name in modules[layer]]
        parts = find_parts(modules[layer], linears, lambda: self.calibration.run(index, layer, hidden))
        for module, name in {dense: "dense", layer: "pruned"}.items():
            path = self.engine.scratch / f"activations-{name}"
            self._cached[module] = CachedOutputs(modules[module], parts, self.calibration, path)

    def _replaying(self, layer: nn.Module, seen: Sequence[str], is_last: bool) -> AbstractContextManager:
        return self._cached[layer].replaying(seen, is_last) if layer in self._cached else nullcontext()

    def _prefix(self, index: int) -> str:
        return f"{self.engine.decoder.path}.{index}"
