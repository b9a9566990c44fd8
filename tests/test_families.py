"""Hybrids and text towers: pruned, with their layers on disk and in memory, saved and loaded by transformers; and families that cannot be
pruned."""

import re

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from support.engine import prune, random_ids, through_layers
from support.families import HYBRIDS
from support.towers import REFUSED, TOWERS

from nnprune.engine.consistency_check import check_consistency
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.layer_store import LayerStore
from nnprune.model.decoder import Decoder
from nnprune.model.export import save_model
from nnprune.model.loading import ModelSource
from nnprune.patterns import NM
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.pruners.wanda import Wanda
from nnprune.records import RunRecord
from nnprune.runtime import Runtime

PRUNED = {f"hybrid-{name}": make for name, make in HYBRIDS.items()} | {f"tower-{name}": make for name, make in TOWERS.items()}
PATTERN = NM(2, 4)
CONFIG = {"model": {}, "pruner": {"_target_": "Wanda"}, "calibration": {}}


def engine_of_folder(model, folder, layers="disk"):
    """The model's folder as a source, and an engine that reads its layers from there."""
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    source = ModelSource(str(folder / "base"))
    decoder = Decoder(source.skeleton(source.config()))
    runtime = Runtime("cpu", layers=layers, activations="host")
    files = LayerFiles(folder / "layers", decoder.path)
    store = LayerStore(decoder, runtime.torch_device, layers, files, source.checkpoint(decoder.model))
    return source, LayerwiseEngine(decoder, store, runtime, folder)


def logits_layer_by_layer(engine, ids):
    with through_layers(engine, ids) as states:
        parts = [logits for _, _, logits in states.logits()]
    return torch.cat(parts).view(*ids.shape, -1)


ALIKE = {
    *("hybrid-falcon_mamba", "hybrid-gemma4_text", "hybrid-bamba", "hybrid-lfm3"),
    *(
        f"tower-{name}"
        for name in ("llava_next", "llava_onevision", "qwen2_5_vl", "smolvlm", "aya_vision", "cohere2_vision", "lighton_ocr")
    ),
}
"""Much as others: only scripts/make_models_table.py tries them."""
IN_MEMORY = ("hybrid-jamba", "hybrid-zamba2", "hybrid-kimi_linear", "tower-gemma4")
CASES = [(family, "disk", Wanda) for family in PRUNED if family not in ALIKE] + [
    (family, "host", SparseGPT) for family in IN_MEMORY
]


@pytest.mark.parametrize(("family", "layers", "pruner"), CASES)
@torch.no_grad()
def test_pruned_and_saved(family, layers, pruner, tmp_path):
    dense, ids = PRUNED[family](), random_ids()
    source, engine = engine_of_folder(dense, tmp_path, layers)
    check_consistency(engine)
    decoder = engine.decoder
    reports = prune(engine, pruner(), dict.fromkeys(decoder.shapes(), PATTERN), random_ids(rows=4, seq_len=24))
    linears = [linear for report in reports for linear in report["linears"]]
    record = RunRecord("completed", "0" * 12, source.name, "wanda", str(PATTERN), per_linear=linears, config=CONFIG)
    files = engine.store.layer_files
    save_model(source, decoder.model, [files.path(index) for index in files.reports], record, tmp_path / "saved")
    [loader] = re.findall(r"model = (\w+)\.from_pretrained", (tmp_path / "saved" / "README.md").read_text())
    saved, info = getattr(transformers, loader).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(saved) is type(dense)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pruned = {f"{linear['name']}.weight" for linear in linears}
    assert len(pruned) == len(linears) == len(decoder.shapes()) > 0
    before, after = dense.state_dict(), saved.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        if name in pruned:
            PATTERN.check(after[name])
            kept = after[name] != 0
            assert pruner is SparseGPT or torch.equal(after[name][kept], before[name][kept]), name
            assert kept.sum() == min((before[name] != 0).sum(), before[name].numel() // 2), name
        else:
            assert torch.equal(after[name], before[name]), name
    expected = saved.eval()(input_ids=ids, use_cache=False).logits
    assert (expected - dense(input_ids=ids, use_cache=False).logits).abs().max() > 1e-3 * expected.std()
    torch.testing.assert_close(logits_layer_by_layer(engine, ids), expected, rtol=0, atol=1e-4 * float(expected.std()))
    assert {path.name for path in (tmp_path / "base").iterdir()} <= {path.name for path in (tmp_path / "saved").iterdir()}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_in_one_line(family, tmp_path):
    make, reason = REFUSED[family]
    with pytest.raises(ValueError) as caught:
        check_consistency(engine_of_folder(make(), tmp_path)[1])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
