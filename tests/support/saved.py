"""Saved models without a run: layer files and a record as a run leaves them."""

import json
from pathlib import Path

from conftest import byte_tokenizer

from nnprune.engine.layer_files import LayerFiles
from nnprune.model.decoder import Decoder
from nnprune.model.export import save_model
from nnprune.model.loading import ModelSource
from nnprune.patterns import NM, zeros_in
from nnprune.records import RunRecord

PATTERN = NM(2, 4)


def make_base(model, folder: Path) -> Path:
    """A checkpoint of a transformers model, with the files that a processor has."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        (folder / name).write_text(json.dumps({"named": name}))
    return folder


def prune_and_save(base: Path, scratch: Path, **options) -> tuple[Path, dict]:
    """Prune a checkpoint to 2:4 by magnitude and save it. Returns the folder, and name in memory -> pruned tensor."""
    source = ModelSource(str(base), **options)
    decoder = Decoder(source.load(source.config()))
    files = LayerFiles(scratch / "layers", decoder.path)
    record = RunRecord("completed", "0" * 12, source.name, "magnitude", str(PATTERN), dtype="float32")
    record.config = {
        "model": {"layers_path": None},
        "pruner": {"_target_": "nnprune.pruners.magnitude.Magnitude"},
        "calibration": {"dataset": "allenai/c4", "seed": 0},
    }
    zeros = size = 0
    for index, layer in enumerate(decoder.layers):
        for name, view in decoder.weights(index).items():
            weight = view.read()
            view.write(weight * PATTERN.mask(weight.abs()))
            zeros, size = zeros + zeros_in(view.read()), size + weight.numel()
            sparsity = zeros_in(view.read()) / weight.numel()
            tensor = {"tensor": view.key} if view.expert else {}
            record.per_linear.append({"name": name, "pattern": str(PATTERN), "sparsity": sparsity, **tensor})
        files.write(index, layer.state_dict, {})
    files.finish()
    record.linear_sparsity = zeros / size
    save_model(source, decoder.model, [files.path(index) for index in files.reports], record, scratch / "model")
    return scratch / "model", dict(decoder.model.state_dict())
