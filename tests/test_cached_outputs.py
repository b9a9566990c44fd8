"""Sequential passes that look up outputs instead of computing them again give the same bits."""

from collections import Counter

import pytest
import torch
from support.engine import IDS, prune_model, recover
from support.families import FAMILIES

import nnprune.engine.cached_outputs
import nnprune.engine.propagation
from nnprune.engine.cached_outputs import CachedOutputs, Part, find_parts
from nnprune.engine.hidden_states import HiddenStates
from nnprune.method import Method
from nnprune.model.decoder import Decoder
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.runtime import Runtime
from nnprune.targets import Asymmetric


def parts_of(family: str) -> dict[str, Part]:
    decoder = Decoder(FAMILIES[family]())
    layer, ids = decoder.layers[0], torch.zeros(1, 8, dtype=torch.int64)
    linears = [name.removeprefix(f"{decoder.path}.0.") for name in decoder.weights(0)]
    call = decoder.record_calls(ids)[0]
    with torch.no_grad():
        return find_parts(dict(layer.named_modules()), linears, lambda: layer(decoder.embed(ids), *call.args, **call.kwargs))


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
    parts, attention = parts_of(family), linear.rsplit(".", 1)[0]
    assert parts[attention].linear == linear
    others = parts.keys() - {attention}
    assert len(others) == (
        0 if family == "opt" else 3 if "self_attn.o_proj" in linear else 2
    )  # OPT flattens the tokens of its MLP
    assert all(parts[name] == Part(name, None) for name in others)
    assert not any(name.startswith(f"{attention}.") for name in others)


CASES = [
    *((family, "plain") for family in FAMILIES),
    *((family, "everything") for family in ("opt", "gemma3", "gpt_neox", "gptj")),
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_caching_changes_no_bit(family, method, tmp_path, monkeypatch):
    def make() -> Method:
        return Method(SparseGPT()) if method == "plain" else Method(SparseGPT(), Asymmetric(), recovery=recover(1, 1))

    options = {"family": family, "propagate": "sequential", "batch_tokens": 32}
    cached, _ = prune_model(tmp_path / "a", method=make(), **options)
    monkeypatch.setattr(nnprune.engine.propagation, "find_parts", lambda *_: {})
    computed, _ = prune_model(tmp_path / "b", method=make(), **options)
    for (name, one), two in zip(cached.state_dict().items(), computed.state_dict().values(), strict=True):
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


def test_outputs_are_cached_where_there_is_room(tmp_path, monkeypatch):
    assert rows_through_linears(tmp_path / "a", monkeypatch, activations="disk")["o_proj"] == 3 * 3 * 4 - 4
    monkeypatch.setattr(nnprune.engine.cached_outputs, "ROOM_SHARE", 0)
    assert rows_through_linears(tmp_path / "b", monkeypatch)["o_proj"] == 3 * 3 * 4 - 4


class Counted(torch.nn.Linear):
    num_calls = 0

    def forward(self, X):
        self.num_calls += 1
        return super().forward(X)


class Twice(torch.nn.Module):
    """Calls one linear twice, another once."""

    def __init__(self):
        super().__init__()
        self.twice, self.once = torch.nn.Linear(32, 32), Counted(32, 32)

    def forward(self, X):
        return self.twice(self.twice(X)) + self.once(X)


@torch.no_grad()
def test_a_linear_that_is_called_twice_is_not_cached(tmp_path):
    layer, linears = Twice(), ["twice", "once"]
    modules = dict(layer.named_modules())
    parts = find_parts(modules, linears, lambda: layer(torch.zeros(1, 8, 32)))
    assert parts == {"once": Part("once", None)}
    runtime, wanted = Runtime(device="cpu", batch_tokens=32), {}
    with HiddenStates(Decoder(FAMILIES["llama"]()), runtime, IDS, tmp_path / "stream") as stream:
        stream.each_batch(lambda rows, hidden: wanted.update({rows.start: layer(hidden)}))

        def check(rows, hidden):
            assert torch.equal(layer(hidden), wanted[rows.start])

        cached = CachedOutputs(modules, parts, stream, tmp_path / "cached")
        for seen, num_calls in ((linears, 3), ((), 3), ((), 0)):  # not final yet, recorded, looked up
            layer.once.num_calls = 0
            with cached.replaying(seen, is_last=False):
                stream.each_batch(check)
            assert layer.once.num_calls == num_calls
        cached.close()
    assert "forward" not in vars(layer.once)


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
