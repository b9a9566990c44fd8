"""Distillation of a pruned model: all of its decoder layers are on the device at once, beside the dense model's last hidden states.

Letters: N samples, T tokens.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnprune.engine import parallel
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.prune_linears import count_zeros
from nnprune.engine.stopwatch import Stopwatch
from nnprune.recovery import Distillation
from nnprune.recovery.base import Compare
from nnprune.recovery.tuning import check_rows

log = logging.getLogger(__name__)


@dataclass(eq=False)
class DistillationPass:
    """Tunes a pruned model as a whole. Its layers become those of other layer files, complete or none: half-tuned ones are no result.

    Args:
        engine: the model; its store has the pruned layers.
        distillation: how they are tuned.
        layer_files: the tuned layers; those of an interrupted run are written again unless all are there.
        stopwatch: times the stages.
    """

    engine: LayerwiseEngine
    distillation: Distillation
    layer_files: LayerFiles
    stopwatch: Stopwatch
    dense: HiddenStates | None = field(default=None, init=False)
    is_finished: bool = field(init=False)  # in an earlier run
    _has_begun: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.is_finished = len(self.layer_files.reports) == self.engine.num_layers
        if self.is_finished:
            self.engine.store.layer_files = self.layer_files

    @contextmanager
    def dense_outputs(self, ids: Tensor) -> Iterator[None]:
        """Calibration ids (N, T) pass through the dense layers, before any is pruned: some models can be loaded only once.

        Raises ValueError for fewer than two rows.
        """
        if self.is_finished:
            yield
            return
        check_rows(len(ids))
        with torch.no_grad(), self.stopwatch.stage("recover"):
            self.dense = self.engine.hidden_states(ids, "distillation")
        with self.dense:
            bar = self.engine.progress(self.engine.num_layers, "dense outputs")
            with torch.no_grad(), self.stopwatch.stage("recover"), bar:
                for index in range(self.engine.num_layers):
                    layer = self.engine.store.fetch(index, pruned=False)
                    self.engine.store.prefetch(index + 1)
                    self.dense.advance(index, layer)
                    self.engine.store.release(index)
                    bar.update()
            yield

    def run(self) -> None:
        """Tune the pruned layers, and have the store fetch the tuned ones from here on."""
        if self.is_finished:
            return
        try:
            with self.stopwatch.stage("recover"):
                self._tune()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("in the distillation, which starts again from the pruned layers") from None
        self.engine.store.layer_files = self.layer_files

    def _tune(self) -> None:
        store, decoder = self.engine.store, self.engine.decoder
        pruned = store.layer_files
        for index in range(self.engine.num_layers):
            store.fetch(index)
        student = Student(self.engine, self.dense)
        report = self.distillation.tune_model(decoder.layers, student, self._log_epoch)
        for parameter in decoder.layers.parameters():
            parallel.broadcast(parameter.data)  # rounded otherwise where another device computed it
        for index, layer in enumerate(decoder.layers):
            store.round(index)
            counts = count_zeros(layer, decoder.weights(index))
            whole = {**pruned.reports[index], **counts, "distilled": report, **self.stopwatch.so_far()}
            self.layer_files.write(index, store.stored_state(index), whole)
        self.layer_files.finish()

    def _log_epoch(self, epoch: int, held_out: float) -> None:
        num_epochs = self.distillation.epochs
        if epoch == 0 and self._has_begun:
            log.info("distillation  no better: second attempt, at a lower learning rate")
        self._has_begun = True
        log.info("distillation  epoch %d/%d  held-out KL divergence %.4g", epoch, num_epochs, held_out)


@dataclass(eq=False)
class Student:
    """The `Model` of nnprune/recovery/whole_model.py.

    Args:
        engine: the model.
        calibration: the dense model's hidden states behind the last layer.
    """

    engine: LayerwiseEngine
    calibration: HiddenStates

    def compare(self, compare: Compare, layers: nn.Module, rows: Sequence[int]) -> Tensor:
        dense, decoder = self.calibration.pick(rows), self.engine.decoder
        if not len(dense):
            return torch.zeros((), requires_grad=True)
        ids = self.calibration.ids[self.calibration.rows].to(dense.device)
        with torch.no_grad():
            hidden = decoder.embed(ids).float()
        # 16-bit models multiply in bfloat16; the weights stay float32
        with torch.autocast(dense.device.type, dtype=torch.bfloat16, enabled=dense.dtype != torch.float32):
            for index, layer in enumerate(layers):
                run = partial(self.calibration.run, index, layer)  # its activations are computed again for the gradients
                hidden = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
            return self.calibration.compare_logits(compare, hidden, dense)
