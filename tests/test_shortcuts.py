"""Sequential passes that leave out what is known already give the same bits."""

import pytest
import torch
from families import FAMILIES
from test_engine import prune_model
from test_propagation import recover

import nnprune.propagation
from nnprune.decoder import Decoder
from nnprune.method import Method
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.shortcuts import find_shortcut
from nnprune.targets import Asymmetric


def found_in(family: str) -> tuple[str, str, int | None] | None:
    decoder = Decoder(FAMILIES[family]())
    layer, ids = decoder.layers[0], torch.zeros(1, 8, dtype=torch.int64)
    prefix = f"{decoder.path}.0."
    linears = {name.removeprefix(prefix): linear for name, linear in decoder.linears(0).items()}
    call = decoder.record_calls(ids)[0]
    with torch.no_grad():
        return find_shortcut(layer, linears, lambda: layer(decoder.embed(ids), *call.args, **call.kwargs))


@pytest.mark.parametrize(
    ("family", "linear"),
    [
        ("opt", "self_attn.out_proj"),
        ("llama", "self_attn.o_proj"),
        ("gemma3", "self_attn.o_proj"),
        ("gpt2", "attn.c_proj"),
        ("gpt_neox", "attention.dense"),
        ("phi", "self_attn.dense"),
    ],
)
def test_the_attention_is_found(family, linear):
    module, found, _ = found_in(family)
    assert (module, found) == (linear.rsplit(".", 1)[0], linear)


CASES = [
    *((family, "plain") for family in FAMILIES),
    *((family, "everything") for family in ("opt", "gemma3", "gpt_neox", "gptj")),
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_shortcuts_change_no_bit(family, method, tmp_path, monkeypatch):
    def make() -> Method:
        return Method(SparseGPT()) if method == "plain" else Method(SparseGPT(), Asymmetric(), recovery=recover(1, 1))

    options = {"family": family, "propagate": "sequential", "batch_tokens": 32}
    short, _ = prune_model(tmp_path / "a", method=make(), **options)
    monkeypatch.setattr(nnprune.propagation, "find_shortcut", lambda *_: None)
    long, _ = prune_model(tmp_path / "b", method=make(), **options)
    for (name, one), two in zip(short.state_dict().items(), long.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("activations", ["host", "disk"])
def test_the_attention_is_computed_once_a_layer(activations, tmp_path, monkeypatch):
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, *a, **k: calls.append(len(q)) or attention(q, *a, **k)
    )
    prune_model(tmp_path, propagate="sequential", batch_tokens=80, activations=activations)
    assert calls.count(5) == 3  # all five rows of the calibration, once in each of three layers
    assert not list(tmp_path.glob("activations*"))
