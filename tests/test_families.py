"""Hybrids, text towers and mixtures of experts: pruned with layers on disk, saved, loaded by transformers; what cannot be pruned."""

import pytest
import torch
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
from nnprune.pruners.wanda import Wanda
from nnprune.records import RunRecord
from nnprune.runtime import Runtime

KINDS = {"hybrid": HYBRIDS, "tower": TOWERS, "mixture": {name: make for name, make in MIXTURES.items() if name != "dbrx"}}
PRUNED = {f"{kind}-{name}": make for kind, families in KINDS.items() for name, make in families.items()}
PATTERN = NM(2, 4)
CONFIG = {"model": {}, "pruner": {"_target_": "Wanda"}, "calibration": {}}


def engine_on_disk(model, folder):
    """The model's folder as a source, and an engine that reads its layers from there."""
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    source = ModelSource(str(folder / "base"))
    decoder = Decoder(source.skeleton(source.config()))
    runtime = Runtime("cpu", layers="disk", activations="host")
    files = LayerFiles(folder / "layers", decoder.path)
    store = LayerStore(decoder, runtime.torch_device, "disk", files, source.checkpoint(decoder.model))
    return source, LayerwiseEngine(decoder, store, runtime, folder)


def logits_layer_by_layer(engine, ids):
    with through_layers(engine, ids) as states:
        parts = [logits for _, _, logits in states.logits()]
    return torch.cat(parts).view(*ids.shape, -1)


@pytest.mark.parametrize("family", PRUNED)
@torch.no_grad()
def test_pruned_and_saved(family, tmp_path):
    dense, ids = PRUNED[family](), random_ids()
    source, engine = engine_on_disk(dense, tmp_path)
    check_consistency(engine)
    decoder = engine.decoder
    reports = prune(engine, Wanda(), dict.fromkeys(decoder.shapes(), PATTERN), random_ids(rows=4, seq_len=24))
    linears = [linear for report in reports for linear in report["linears"]]
    record = RunRecord("completed", "0" * 12, source.name, "wanda", str(PATTERN), per_linear=linears, config=CONFIG)
    files = engine.store.layer_files
    save_model(source, decoder.model, [files.path(index) for index in files.reports], record, tmp_path / "saved")
    saved, info = type(dense).from_pretrained(tmp_path / "saved", output_loading_info=True)
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
        assert torch.equal(weight[kept], base[kept]), linear["name"]
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
        check_consistency(engine_on_disk(make(), tmp_path)[1])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
