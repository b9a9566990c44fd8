"""Sequential passes that leave out what is known already give the same bits."""

from collections import Counter

import pytest
import torch
from families import FAMILIES
from test_engine import prune_model
from test_propagation import recover

import nnprune.propagation
from nnprune.activations import Activations
from nnprune.decoder import Decoder
from nnprune.method import Method
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.shortcuts import KnownOutputs, find_shortcut
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
    monkeypatch.setattr(nnprune.propagation, "ROOM_SHARE", 0)
    long, _ = prune_model(tmp_path / "b", method=make(), **options)
    for (name, one), two in zip(short.state_dict().items(), long.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def rows_through_linears(tmp_path, monkeypatch, **options) -> dict[str, int]:
    """Name of a linear within its layer -> rows of the calibration, in all layers, for which it was computed."""
    rows = Counter()
    linear, weights = torch.nn.functional.linear, {}

    def count(X, weight, *args):
        if len(X) > 1:  # no probe
            rows[weights.get(id(weight))] += len(X)
        return linear(X, weight, *args)

    def prepare(model):
        weights.update({id(module.weight): name.rsplit(".", 1)[1] for name, module in model.named_modules() if "proj" in name})
        return model

    model = FAMILIES["llama"]
    monkeypatch.setitem(FAMILIES, "llama", lambda: prepare(model()))
    monkeypatch.setattr(torch.nn.functional, "linear", count)
    prune_model(tmp_path, propagate="sequential", batch_tokens=64, **options)
    return rows


def test_a_linear_is_computed_once_a_layer(tmp_path, monkeypatch):
    rows = rows_through_linears(tmp_path, monkeypatch)
    assert {rows[name] for name in ("q_proj", "o_proj", "gate_proj", "up_proj")} == {3 * 4}
    assert rows["down_proj"] == 2 * 4  # nothing is handed on behind the last layer


def test_outputs_are_kept_where_there_is_room(tmp_path, monkeypatch):
    assert rows_through_linears(tmp_path, monkeypatch, activations="disk")["o_proj"] > 3 * 4


class Twice(torch.nn.Module):
    """Calls one linear twice."""

    def __init__(self):
        super().__init__()
        self.linear, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, X):
        return self.linear(self.linear(X)) + self.other(X)


@torch.no_grad()
def test_what_is_called_twice_is_computed(tmp_path):
    layer, X = Twice(), torch.randn(4, 3, 8)
    wanted = layer(X)
    known = KnownOutputs(lambda width: Activations((4, 3, width), torch.float32, X.device, "host", tmp_path))
    at_hand = []
    for keep in (True, False):
        with known.used(layer, ["linear", "other"], keep, lambda: at_hand[-1]):
            for rows in (slice(0, 2), slice(2, 4)):
                at_hand.append(rows)
                assert torch.equal(layer(X[rows]), wanted[rows])
    assert known._complete == {"other"}


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
