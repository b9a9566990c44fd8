"""Calibration text that the dense model writes, before anything else is done with its weights."""

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from nnprune.engine import parallel
from nnprune.experiment.build import Experiment
from nnprune.experiment.identity import code_entry, science
from nnprune.files.digests import cache_folder
from nnprune.model.decoder import Decoder
from nnprune.records import fingerprint, read_journal, write_journal
from nnprune.runtime import available_host_bytes


@parallel.on_rank_0
def written_ids(experiment: Experiment, decoder: Decoder, ids: Tensor) -> Tensor:
    """The calibration ids (N, T), int64, that the dense model writes after the first column of `ids`.

    They are kept in the user's cache, so that all methods of a sweep, and resumed runs, see the same. Raises ValueError if the model does
    not fit into memory; `decoder` tells how large it is.
    """
    source, runtime, calibration = experiment.source, experiment.runtime, experiment.calibration
    journal = _journal(experiment)
    if journal and (found := read_journal(journal)):
        return torch.tensor(found, dtype=torch.int64)
    need = sum(map(torch.numel, decoder.model.parameters())) * experiment.computing_dtype.itemsize
    free = min(runtime.free_device_bytes(), available_host_bytes())
    if need > free:
        raise ValueError(
            f"calibration=self: the whole model must be in memory to write its text and takes {need / 2**30:.1f} GiB, there are "
            f"{free / 2**30:.1f}; use a larger machine, or another calibration"
        )
    model = source.load(source.config()).to(runtime.torch_device, experiment.computing_dtype)
    written = calibration.write(model, ids)
    with suppress(OSError):
        if journal:
            write_journal(journal, written.tolist())
    return written


def _journal(experiment: Experiment) -> Path | None:
    """The file in the user's cache for what this model writes with these settings; None when nobody has a home."""
    calibration = experiment.config["calibration"]
    calibration = calibration | code_entry(type(experiment.calibration), calibration)
    settings = {"model": science(experiment)["model"], "calibration": calibration}
    try:
        return cache_folder() / "written" / f"{fingerprint(settings)}.json"
    except RuntimeError:
        return None
