"""The run's own pass over a few random layers of a model's shape, timed."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from nnprune.engine.consistency_check import check_consistency
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.importance_pass import run_importance_pass
from nnprune.engine.input_groups import layer_groups
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.layer_store import LayerStore
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.engine.stopwatch import Stopwatch
from nnprune.experiment.build import Experiment
from nnprune.experiment.preparation import chosen_linears, routing
from nnprune.model.decoder import Decoder

LEAST_LAYERS = 2  # one hands on to the other
MOST_LAYERS = 4  # as many as it takes to reach the largest, such as the first one with experts
VOCABULARY = 512


@torch.no_grad()
def time_layers(
    cells: Sequence[Experiment], ids: torch.Tensor, whole: Decoder
) -> tuple[dict[str, float], list[list[str]], int]:
    """Seconds by stage of a few layers like the first ones of the `whole` model, for `ids` (N, T) < VOCABULARY; the groups of linears of
    the largest of them that share an input and are pruned; and the parameters of these layers.

    "load" reads them from the file cache: a cold disk takes longer.
    """
    num_layers = min(max(whole.largest + 1, LEAST_LAYERS), MOST_LAYERS)
    first = cells[0]
    config, runtime = first.source.config(), first.runtime
    watch, text = Stopwatch(runtime.torch_device), config.get_text_config()
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # such as layer_types
            setattr(text, key, (value * num_layers)[:num_layers])
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = num_layers, VOCABULARY, 0
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
            engine = LayerwiseEngine(decoder, store, runtime, folder, routing(first.calibration))
            check_consistency(engine)
        if not first.is_dense:
            decoder.keep(chosen_linears(first, whole, like=decoder))
        tasks = [
            PruneTask(cell.method, dict.fromkeys(decoder.shapes(), cell.allocation.typical(cell.pattern)), files)
            for cell, files in zip(cells, finished, strict=True)
            if not cell.is_dense
        ]
        with engine.hidden_states(ids, "windows") as states:
            groups = layer_groups(states, decoder.largest, store.fetch(decoder.largest))
            if tasks and first.allocation.looks_at != "nothing":
                with watch.stage("allocation"):
                    run_importance_pass(engine, ids, {"": lambda one: first.allocation.measure(one, first.pattern)})
            PruningPass(engine, tasks, first.config["propagate"], watch).run(ids, [states])
    logging.disable(logging.NOTSET)
    return watch.seconds, groups, sum(map(torch.numel, decoder.layers.parameters()))
