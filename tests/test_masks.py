"""Masks of a saved model: what the file says, and that training leaves the zeros alone."""

import json
import re

import pytest
import torch
from conftest import ROOT
from support.families import FAMILIES, MIXTURES
from support.saved import make_base, prune_and_save
from transformers import AutoModelForCausalLM

from nnprune.check import main
from nnprune.model.masks import keep_zeros, read_masks


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def saved(request, tmp_path_factory):
    """A saved 2:4 model; gpt2's weights lie transposed, mixtral's experts are parts of two tensors a layer."""
    base = make_base((FAMILIES | MIXTURES)[request.param](), tmp_path_factory.mktemp("models") / "base")
    return prune_and_save(base, tmp_path_factory.mktemp("saved"))[0]


@pytest.fixture
def masks(saved, tmp_path, capsys):
    assert main([str(saved), "--masks", str(tmp_path / "masks.safetensors")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["masks", "ok", str(tmp_path / "masks.safetensors")]
    return tmp_path / "masks.safetensors"


def load(saved):
    return AutoModelForCausalLM.from_pretrained(saved)


def step(model, optimizer):
    ids = torch.arange(32).view(2, 16)
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def test_a_mask_file_has_a_bit_for_each_pruned_weight(saved, masks):
    model, found = load(saved), read_masks(masks)
    linears = json.loads((saved / "pruning.json").read_text())["per_linear"]
    assert list(found) == list(dict.fromkeys(one.get("tensor", f"{one['name']}.weight") for one in linears))
    for name, mask in found.items():
        assert torch.equal(mask, model.get_parameter(name) != 0), name


def test_a_mask_file_is_read_as_documented_without_nnprune(masks, monkeypatch):
    monkeypatch.chdir(masks.parent)
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(import json\n.*?)```", text, re.DOTALL)
    exec(block, names := {})
    found = read_masks(masks)
    assert names["masks"].keys() == found.keys()
    assert all(torch.equal(torch.from_numpy(mask).bool(), found[name]) for name, mask in names["masks"].items())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9)])
def test_zeros_stay_zero_and_all_else_is_trained(saved, masks, kind):
    model, found = load(saved), read_masks(masks)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = kind(model.parameters())
    handle = keep_zeros(model, optimizer)
    for _ in range(3):
        step(model, optimizer)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        if name in found:
            assert not parameter[~found[name]].any()
    handle.remove()
    step(model, optimizer)
    assert any(model.get_parameter(name)[~mask].any() for name, mask in found.items())


def test_masks_from_a_file_prune_a_dense_model(saved, masks):
    model, found = load(saved), read_masks(masks)
    for name in found:
        torch.nn.init.normal_(model.get_parameter(name))
    keep_zeros(model, torch.optim.SGD(model.parameters()), found)
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in found.items())


def test_what_does_not_fit_is_refused(saved, tmp_path):
    model = load(saved)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"keep_zeros: x.weight has a mask \(2,\), the model has no weight of that name"):
        keep_zeros(model, optimizer, {"x.weight": torch.ones(2, dtype=torch.bool)})
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    with pytest.raises(ValueError, match="no linear of the model has zeros; load a pruned model"):
        keep_zeros(model, optimizer)
    (tmp_path / "other").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="is no mask file"):
        read_masks(tmp_path / "other")
    with pytest.raises(ValueError, match="is no mask file"):
        read_masks(saved / "model.safetensors")
    assert main([str(saved), "--masks", str(tmp_path / "nowhere" / "file")]) == 1
