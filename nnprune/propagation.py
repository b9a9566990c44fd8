"""How the calibration travels: what the linears of each decoder layer are seen to receive, and what is handed on.

Two streams of the same tokens: the calibration, behind the layers as `propagate` has it, and, where a method compares the two,
the reference, behind dense layers.

Letters: N samples, B batch, T tokens, D hidden.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from nnprune.activations import Activations
from nnprune.inputs import PROBE_TOKENS, InputCollector, input_groups
from nnprune.layerwise import LayerwiseEngine
from nnprune.method import Method
from nnprune.runtime import available_host_bytes, resident_host_bytes
from nnprune.shortcuts import KnownOutputs, Shortcut, find_shortcut
from nnprune.stopwatch import Stopwatch
from nnprune.streams import Stream

PROPAGATE = ("pruned", "dense", "sequential")

ROOM_SHARE = 0.25
"""Of the host's free memory, what the outputs of one linear may take that are kept to save time."""


class Propagation:
    """The calibration before the decoder layer that comes next.

    Args:
        engine: the model and its layers.
        mode: what later linears see. pruned: outputs of pruned layers; dense: of dense layers; sequential: of pruned layers,
            and within a layer of the linears already pruned.
        calibration: its hidden states.
        reference: those of the dense model, if a method needs them.
        watch: told how long forwards take.
    """

    def __init__(
        self, engine: LayerwiseEngine, mode: str, calibration: Stream, reference: Stream | None, watch: Stopwatch
    ) -> None:
        self.engine = engine
        self.store = engine.store
        self.mode = mode
        self.calibration = calibration
        self.reference = reference
        self.watch = watch
        self._ahead: InputCollector | None = None  # what the next layer's linears have been seen to receive already
        self._reference_is_behind = False  # the layer that comes next
        self._rows = slice(0, 0)  # at hand
        # Of the calibration and of the reference, through the layer at hand:
        self._shortcuts: dict[str, Shortcut] = {}
        self._known: dict[str, KnownOutputs] = {}

    def skip(self, index: int) -> None:
        """Take both streams through decoder layer `index`, which is finished."""
        with self.watch.stage("calibration"):
            if self.reference is not None:
                self.advance_reference(index, self.store.fetch(index, pruned=False))
                self._reference_is_behind = False
            self.calibration.advance(index, self.store.fetch(index, pruned=self.mode != "dense"))

    def advance_reference(self, index: int, layer: nn.Module) -> None:
        """Take the reference through the dense decoder layer `index` before its linears' inputs are looked at.

        Those are then compared with what the same layer makes of the calibration itself.
        """
        self.reference.advance(index, layer)
        self._reference_is_behind = True

    def collectors(self, index: int, layer: nn.Module, methods: Sequence[Method], hand_on: bool) -> Iterator[InputCollector]:
        """What the linears of decoder layer `index` receive: of all at once, or, sequentially, of a group at a time, between
        which the caller prunes it. Afterwards the reference is behind this layer, and the calibration too if dense outputs
        are to be handed on."""
        if self.mode != "sequential":
            if self._ahead is None:
                with self.watch.stage("calibration"):
                    collector = self._collector(index, layer, layer, methods, self._groups(index, layer))
                    self._collect(index, layer, layer, collector, hand_on and self.mode == "dense", is_last=True)
            else:
                collector, self._ahead = self._ahead, None
            collector.finish()
            self._reference_is_behind = False
            yield collector
            return
        pairs = any(method.pairs_inputs for method in methods)
        dense = copy.deepcopy(layer) if pairs or (self.reference and not self._reference_is_behind) else layer
        groups = self._groups(index, layer)
        self._find_shortcuts(index, layer, both=dense is not layer)
        final: list[str] = []
        for names in groups:
            with self.watch.stage("calibration"):
                collector = self._collector(index, layer, dense, methods, [names])
                self._collect(index, layer, dense, collector, hand_on=False, is_last=names is groups[-1], final=final)
            final += [self._within(index, name) for name in names]
            collector.finish()
            yield collector
        self._reference_is_behind = False

    def forget(self) -> None:
        """The weights of the layer at hand have changed once more: nothing of it is known any more."""
        for known in (*self._shortcuts.values(), *self._known.values()):
            known.close()
        self._shortcuts, self._known = {}, {}

    def hand_on(self, index: int, methods: Sequence[Method]) -> None:
        """Take the calibration through the pruned decoder layer `index`; and, for `methods` that prune the next layer as it is, each
        batch at once into the next layer's linears, so that the activations are read once a layer."""
        with self.watch.stage("calibration"):
            layer = self.store.fetch(index)
            if self.mode == "sequential" or not methods or any(method.recovery.epochs_before for method in methods):
                final = [self._within(index, name) for name in self.engine.decoder.linears(index)]
                with self._without_known("calibration", layer, (), final, keep=False):
                    self.calibration.each_batch(lambda rows, hidden: self._run(index, layer, rows, hidden))
                self.forget()
                return
            following = self.store.fetch(index + 1, pruned=False)
            collector = self._collector(index + 1, following, following, methods, self._groups(index + 1, following))
            self._collect(index + 1, following, following, collector, hand_on=False, is_last=True, before=(index, layer))
            self._ahead = collector

    def _collect(
        self,
        index: int,
        layer: nn.Module,
        dense: nn.Module,
        collector: InputCollector,
        hand_on: bool,
        is_last: bool,
        before: tuple[int, nn.Module] | None = None,
        final: Sequence[str] = (),
    ) -> None:
        """Show a collector what layer `index` receives from the whole calibration.

        The calibration is left with the outputs of `before`, a layer it goes through first; with those of `layer`, if they
        are to be handed on; or as it is. `final`: linears that are pruned already. The reference, unless it is behind this
        layer already, is left with the outputs of the dense layer by the last collector.
        """
        pairs = collector.pairs
        advances = self.reference is not None and not self._reference_is_behind and is_last

        def step(rows: slice, hidden: Tensor) -> Tensor | None:
            self._rows = rows
            if before is not None:
                hidden = self.calibration.run(*before, hidden)
            reference = None
            if pairs or advances:
                own = hidden if self._reference_is_behind else self.reference.activations.get(rows)
                with collector.reference(stop=not advances):
                    reference = self.calibration.run(index, dense, own)
            output = None
            with collector.rows(rows):
                output = self.calibration.run(index, layer, hidden)
            if advances:  # last of all: a batch that failed halfway comes again
                self.reference.activations.put(rows, reference)
            return output if hand_on else hidden if before is not None else None

        seen = [name for names in collector.groups for name in names]
        with collector.watching(stop=not hand_on), ExitStack() as stack:
            stack.enter_context(self._without_known("calibration", layer, seen, final, keep=True))
            if pairs or advances:
                stack.enter_context(self._without_known("reference", dense, seen, final, keep=not advances))
            self.calibration.each_batch(step)

    def _run(self, index: int, layer: nn.Module, rows: slice, hidden: Tensor) -> Tensor:
        self._rows = rows
        return self.calibration.run(index, layer, hidden)

    @contextmanager
    def _without_known(
        self, stream: str, layer: nn.Module, seen: Sequence[str], final: Sequence[str], keep: bool
    ) -> Iterator[None]:
        """A pass of this stream through the layer, up to the linears that are now `seen`, which leaves out what is known of it, and
        with `keep` remembers what linears gave that are `final`."""
        shortcut, known = self._shortcuts.get(stream), self._known.get(stream)
        if known is None:
            yield
            return
        with ExitStack() as stack:
            if shortcut is not None:
                final = [name for name in final if name == shortcut.linear or not name.startswith(f"{shortcut.module}.")]
                is_end = any(name.endswith(f".{shortcut.linear}") for name in seen)
                stack.enter_context((shortcut.recording if is_end else shortcut.used)(layer, lambda: self._rows))
            stack.enter_context(known.used(layer, final, keep, lambda: self._rows))
            yield

    def _find_shortcuts(self, index: int, layer: nn.Module, both: bool) -> None:
        linears = {self._within(index, name): linear for name, linear in self.engine.decoder.linears(index).items()}
        hidden = self.calibration.probe(PROBE_TOKENS)
        found = find_shortcut(layer, linears, lambda: self.calibration.run(index, layer, hidden))
        for stream in ("calibration", "reference") if both else ("calibration",):
            if found:
                self._shortcuts[stream] = Shortcut(*found, partial(self._buffer, stream))
            self._known[stream] = KnownOutputs(partial(self._room_for_outputs, stream))

    def _buffer(self, stream: str, width: int) -> Activations:
        """Room for what a linear of `width` inputs receives from the whole calibration."""
        like, runtime = self.calibration.activations.tensor, self.engine.runtime
        path = self.engine.scratch / f"activations-shortcut-{stream}.bin"
        return Activations((*like.shape[:2], width), like.dtype, self.engine.device, runtime.activations, path)

    def _room_for_outputs(self, stream: str, width: int) -> Activations | None:
        """Room for `width` outputs likewise, if there is plenty in the device's own memory: from elsewhere they come no sooner
        than they are computed again."""
        like = self.calibration.activations
        num_bytes = like.tensor.shape[:2].numel() * width * like.tensor.itemsize
        is_cpu = self.engine.device.type == "cpu"
        if not like.is_near or (is_cpu and num_bytes > ROOM_SHARE * (available_host_bytes() - resident_host_bytes())):
            return None
        outputs = self._buffer(stream, width)
        return outputs if outputs.is_near else None

    def _collector(
        self, index: int, layer: nn.Module, dense: nn.Module, methods: Sequence[Method], groups: list[list[str]]
    ) -> InputCollector:
        linears = self.engine.decoder.linears(index)
        reference = None
        if dense is not layer:
            reference = {name: dense.get_submodule(self._within(index, name)) for name in linears}
        kinds = set().union(*(method.statistics for method in methods))
        own = [method.pruner for method in methods]
        return InputCollector(kinds, own, groups, linears, self.calibration.ids.shape[1], reference)

    def _within(self, index: int, name: str) -> str:
        """The name that a linear of decoder layer `index` has within it."""
        return name.removeprefix(f"{self.engine.decoder.path}.{index}.")

    def _groups(self, index: int, layer: nn.Module) -> list[list[str]]:
        hidden = self.calibration.probe(PROBE_TOKENS)
        return input_groups(self.engine.decoder.linears(index), lambda: self.calibration.run(index, layer, hidden))
