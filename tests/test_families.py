"""Hybrids, text towers and mixtures of experts: pruned with layers on disk and in memory, saved, loaded by transformers; and what
cannot be pruned."""

import re

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from support.engine import prune, random_ids, through_layers
from support.families import HYBRIDS, MIXTURES
from support.towers import REFUSED, TOWERS

from nnprune.engine.consistency_check import check_consistency
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.layer_store import LayerStore
from nnprune.model.decoder import Decoder
from nnprune.model.export import save_model, weight_of
from nnprune.model.loading import ModelSource
from nnprune.patterns import NM
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.pruners.wanda import Wanda
from nnprune.records import RunRecord
from nnprune.runtime import Runtime

KINDS = {"hybrid": HYBRIDS, "tower": TOWERS, "mixture": {name: make for name, make in MIXTURES.items() if name != "dbrx"}}
PRUNED = {f"{kind}-{name}": make for kind, families in KINDS.items() for name, make in families.items()}
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
    assert len({linear["name"] for linear in linears}) == len(linears) == len(decoder.shapes()) > 0
    before, after = (
        {name: view for index in range(len(one.layers)) for name, view in one.weights(index).items()}
        for one in (Decoder(dense), Decoder(saved))
    )
    for linear in linears:
        weight, base = after[linear["name"]].read(), before[linear["name"]].read()
        PATTERN.check(weight)
        kept = weight != 0
        assert pruner is SparseGPT or torch.equal(weight[kept], base[kept]), linear["name"]
        assert kept.sum() == min((base != 0).sum(), base.numel() // 2), linear["name"]
    pruned, others, base = {weight_of(linear) for linear in linears}, saved.state_dict(), dense.state_dict()
    assert others.keys() == base.keys()
    assert all(torch.equal(others[name], base[name]) for name in base if name not in pruned)
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
