"""The run's own pass over a few random layers of a model's shape, timed."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from nnprune.allocations.uniform import Uniform
from nnprune.engine.consistency_check import check_consistency
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.importance_pass import run_importance_pass
from nnprune.engine.input_groups import layer_groups
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.layer_store import LayerStore
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.engine.stopwatch import Stopwatch
from nnprune.experiment.build import Experiment
from nnprune.experiment.preparation import routing
from nnprune.model.decoder import Decoder

LAYERS = (
    2,
    4,
)  # at least two, one hands on to the other; more where the largest, such as one with experts, comes after smaller ones
VOCABULARY = 512


@torch.no_grad()
def time_layers(
    cells: Sequence[Experiment], ids: torch.Tensor, path: str, largest: int
) -> tuple[dict[str, float], list[list[str]], int]:
    """Seconds by stage of the first few layers, found at `path`, for `ids` (N, T) < VOCABULARY; the groups of linears of the
    `largest` layer, or of the largest of those, that share an input; and the parameters of the layers.

    "load" reads them from the file cache: a cold disk takes longer.
    """
    num_layers = min(max(largest + 1, LAYERS[0]), LAYERS[1])
    first = cells[0]
    config, runtime = first.source.config(), first.runtime
    watch, text = Stopwatch(runtime.torch_device), config.get_text_config()
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # such as layer_types
            setattr(text, key, (value * num_layers)[:num_layers])
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = num_layers, VOCABULARY, 0
    decoder = Decoder(first.source.random(config), path)
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
        tasks = [
            PruneTask(cell.method, Uniform().plan(cell.pattern, decoder.shapes_by_layer()), files)  # as good as any plan
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
