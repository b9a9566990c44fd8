"""The run's own pass over a few random layers of a model's shape, timed."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from nnprune.engine.consistency_check import check_consistency
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.importance_pass import run_importance_pass
from nnprune.engine.input_collector import layer_groups
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.layer_store import LayerStore
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.engine.stopwatch import Stopwatch
from nnprune.experiment.build import Experiment
from nnprune.experiment.preparation import chosen_linears
from nnprune.model.decoder import Decoder

LAYERS = 2  # one hands on to the other
VOCABULARY = 512


@torch.no_grad()
def time_layers(cells: Sequence[Experiment], ids: torch.Tensor, whole: Decoder) -> tuple[dict[str, float], list[list[str]]]:
    """Seconds by stage of `LAYERS` layers like those of the `whole` model, for `ids` (N, T) < VOCABULARY; and the groups of linears of a
    layer that share an input and are pruned. "load" reads them from the file cache: a cold disk takes longer."""
    first = cells[0]
    config, runtime = first.source.config(), first.runtime
    watch, text = Stopwatch(runtime.torch_device), config.get_text_config()
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # such as layer_types
            setattr(text, key, (value * 2)[:LAYERS])
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = LAYERS, VOCABULARY, None
    decoder, path = Decoder(first.source.random(config), whole.path), whole.path
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finished = [LayerFiles(folder / str(index), path) for index in range(len(cells))]
        torch.save(decoder.layers.state_dict(), folder / "weights")
        with watch.stage("load"):
            decoder.layers.load_state_dict(torch.load(folder / "weights"))
            offload = runtime.layers.replace("disk", "host")
            store = LayerStore(decoder, runtime.torch_device, offload, finished[0], None, first.computing_dtype)
            engine = LayerwiseEngine(decoder, store, runtime, folder)
            check_consistency(engine)
        if not first.is_dense:
            decoder.keep(chosen_linears(first, whole, like=decoder))
        tasks = [
            PruneTask(cell.method, dict.fromkeys(decoder.shapes(), cell.allocation.typical(cell.pattern)), files)
            for cell, files in zip(cells, finished, strict=True)
            if not cell.is_dense
        ]
        with engine.hidden_states(ids, "windows") as states:
            groups = layer_groups(states, 0, store.fetch(0))
            if tasks and first.allocation.looks_at != "nothing":
                with watch.stage("allocation"):
                    run_importance_pass(engine, ids, {"": lambda one: first.allocation.measure(one, first.pattern)})
            PruningPass(engine, tasks, first.config["propagate"], watch).run(ids, [states])
    logging.disable(logging.NOTSET)
    return watch.seconds, groups
