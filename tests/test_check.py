"""`nnprune-check`: accepts what was saved, and tells in one line what was changed since."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES
from support.saved import make_base, prune_and_save

from nnprune.check import main
from nnprune.model import export
from nnprune.run import run

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(FAMILIES["llama"](), tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def intact(base, tmp_path_factory):
    """A saved model of several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "MAX_SHARD_BYTES", 40_000)
        return prune_and_save(base, tmp_path_factory.mktemp("saved"))[0]


@pytest.fixture
def saved(intact, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(intact, tmp_path / "model")


def edit(folder, key, change):
    """Change the tensors of the file that holds a key, in place."""
    path = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]
    state = load_file(path)
    change(state, key)
    save_file(state, path, {"format": "pt"})


def refuse(capsys, folder, *arguments):
    """The lines of what is wrong."""
    assert main([str(folder), *arguments]) == 1
    told = capsys.readouterr()
    assert not told.err
    lines = [line for line in told.out.splitlines() if "FAULT" in line or line.startswith("Error: ")]
    assert lines, told.out
    return "\n".join(lines)


def test_what_was_saved_is_accepted(intact, base, capsys):
    for arguments in ([], ["--base", str(base)]):
        assert main([str(intact), *arguments]) == 0
        told = capsys.readouterr().out
        assert [line.split()[:2] for line in told.splitlines()] == [
            [aspect, "ok"] for aspect in ("load", "files", "patterns", "values", "base")
        ]
        assert "21 linears have 2:4" in told


def flip_a_bit(state, key):
    state[key].view(torch.int32)[3] ^= 1


def negative_zero(state, key):  # equal by value, another bit
    state[key].flatten()[0] = -state[key].flatten()[0]


def one_more_weight(state, key):
    row = state[key][5]
    row[(row == 0).nonzero()[0]] = 1


def one_zero_more(state, key):
    state[key][5, state[key][5].nonzero()[0]] = 0


def not_a_number(state, key):
    state[key][0, 0] = float("nan")


def another_dtype(state, key):
    state[key] = state[key].double()


def missing(state, key):
    del state[key]


def one_tensor_more(state, key):
    state[f"{LAYER}.mlp.spare.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (flip_a_bit, f"{LAYER}.input_layernorm.weight", f"{LAYER}.input_layernorm.weight differs from the base model's"),
        (negative_zero, "lm_head.weight", "lm_head.weight differs from the base model's"),
        (one_more_weight, f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.mlp.up_proj keeps 3 weights in a group of 4"),
        (one_zero_more, f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.mlp.up_proj has 1025 zeros, by the record 1024"),
        (not_a_number, f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.mlp.up_proj.weight holds NaN or infinite values"),
        (not_a_number, "lm_head.weight", "lm_head.weight holds NaN or infinite values"),
        (another_dtype, "model.norm.weight", "model.norm.weight is F64 (32,), in the base model F32 (32,)"),
        (missing, f"{LAYER}.input_layernorm.weight", f"lacks {LAYER}.input_layernorm.weight"),
        (one_tensor_more, f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.mlp.spare.weight is not in the base model"),
    ],
)
def test_tensors_that_were_changed(change, key, message, saved, capsys):
    edit(saved, key, change)
    assert message in refuse(capsys, saved)


def test_damaged_files(saved, intact, capsys):
    def again(name):
        shutil.copy(intact / name, saved / name)

    shard = sorted(path.name for path in saved.glob("*.safetensors"))[1]
    (saved / shard).unlink()
    assert f"names {shard}, which is missing" in refuse(capsys, saved)
    (saved / shard).write_bytes((intact / shard).read_bytes()[:-5])
    assert f"{shard} cannot be read" in refuse(capsys, saved)
    again(shard)
    shutil.copy(saved / shard, saved / "spare.safetensors")
    assert "spare.safetensors is no part of the checkpoint" in refuse(capsys, saved)
    (saved / "spare.safetensors").unlink()
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    place = index["weight_map"]["model.norm.weight"]
    other = next(name for name in index["weight_map"].values() if name != place)
    index["metadata"]["total_size"] += 1
    index["weight_map"]["model.norm.weight"] = other
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    told = refuse(capsys, saved)
    assert f"model.norm.weight is in {place}, by the index in {other}" in told
    assert "says total_size" in told
    again("model.safetensors.index.json")
    for name, content in (("tokenizer.json", "{"), ("config.json", "[]"), ("pruning.json", "{}"), ("pruning.json", "{")):
        (saved / name).write_text(content)
        assert refuse(capsys, saved).count("\n") == 0
        again(name)
    (saved / "pruning.json").unlink()
    assert "pruning.json cannot be loaded" in refuse(capsys, saved)
    assert "no such directory" in refuse(capsys, saved / "nowhere")


def rewrite(folder, change):
    path = folder / "pruning.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_another_pattern(saved, capsys):
    rewrite(saved, lambda record: [one.update(pattern="1:4") for one in record["per_linear"]])
    told = refuse(capsys, saved)
    assert "keeps 2 weights in a group of 4, more than 1:4 allows" in told
    assert "and 18 more" in told
    rewrite(saved, lambda record: record["per_linear"][0].update(pattern="many"))
    assert "sparsity=many: not a pattern" in refuse(capsys, saved)


def test_a_base_model_that_is_not_there(saved, base, tmp_path, capsys):
    rewrite(saved, lambda record: record["base_model"].update(path=str(tmp_path / "gone")))
    assert main([str(saved)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(
        "base      --     names and the 9 tensors that were left alone are not compared with the base model: "
    )
    assert main([str(saved), "--base", str(base)]) == 0
    capsys.readouterr()
    assert "no such directory" in refuse(capsys, saved, "--base", str(tmp_path / "gone"))
    edit(saved, f"{LAYER}.mlp.up_proj.weight", one_more_weight)
    assert "keeps 3 weights in a group of 4" in refuse(capsys, saved)


def test_another_base_model(saved, tmp_path, capsys):
    other = make_base(FAMILIES["mistral"](), tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, other / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight differs from the base model's" in refuse(capsys, saved, "--base", str(other))


@pytest.mark.parametrize(
    "settings",
    [
        ["pruner=sparsegpt", "recover=layer", "recover.epochs_after=1"],
        ["pruner=wanda", "update=refit", "sparsity=0.6", "runtime=low_memory"],
        ["sparsity=dense"],
        ["model.path=demo", "pruner=magnitude"],
    ],
)
def test_runs(settings, tiny_config, capsys):
    cfg = tiny_config("sparsity=2:4", "save=true", *settings)
    record = run(cfg)
    [path] = Path(cfg.outputs).rglob("pruning.json")
    assert json.loads(path.read_text())["fingerprint"] == record.fingerprint
    assert main([str(path.parent)]) == 0, capsys.readouterr().out
