"""Views of what a pruner may prune: nn.Linear, and GPT-2's transposed Conv1D."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nnprune.model.weight_views import weight_views

O, I = 6, 4  # noqa: E741


def layer(kind):
    return nn.ModuleDict({"inner": nn.Linear(I, O) if kind == "linear" else Conv1D(O, I), "norm": nn.LayerNorm(I)})


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_view_of_a_weight(kind):
    module = layer(kind)
    views = weight_views(module, "model.layers.3")
    assert list(views) == ["model.layers.3.inner"]
    view = views["model.layers.3.inner"]
    assert view.shape == (O, I)
    assert view.parameter is module["inner"].weight
    wanted = torch.arange(float(O * I)).view(O, I)
    view.write(wanted)
    assert torch.equal(view.read(), wanted)
    stored = module["inner"].weight.detach()
    assert torch.equal(stored if kind == "linear" else stored.t(), wanted)
    assert torch.equal(view.within(stored.clone()), wanted)
    x = torch.randn(2, 3, I)
    torch.testing.assert_close(module["inner"](x), x @ wanted.t() + module["inner"].bias)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_inputs_are_observed_as_tokens(kind):
    module, seen = layer(kind), []
    handle = weight_views(module, "l")["l.inner"].observe(seen.append)
    x = torch.randn(2, 3, I, requires_grad=True)
    module["inner"](x)
    handle.remove()
    module["inner"](x)
    [X] = seen
    assert torch.equal(X, x.detach().view(6, I)) and not X.requires_grad


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_writing_keeps_dtype_and_place_of_the_parameter(kind):
    module = layer(kind).to(torch.bfloat16)["inner"]
    place, view = module.weight.data_ptr(), weight_views(module, "l")["l"]
    view.write(torch.full((O, I), 1 + 2**-12))
    assert module.weight.data_ptr() == place
    assert torch.equal(view.read(), torch.ones(O, I, dtype=torch.bfloat16))
    assert not view.read().requires_grad


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_what_an_observer_raises_ends_the_forward(kind):
    module, computed = layer(kind)["inner"], []
    module.register_forward_hook(lambda *_: computed.append(1))

    def see(_):
        raise InterruptedError

    handle = weight_views(module, "l")["l"].observe(see)
    with pytest.raises(InterruptedError):
        module(torch.randn(3, I))
    handle.remove()
    assert not computed
    assert module(torch.randn(3, I)).shape == (3, O)


def test_views_come_in_the_order_of_the_definition():
    module = nn.ModuleDict({"b": nn.Linear(6, 4), "norm": nn.LayerNorm(4), "a": nn.ModuleDict({"c": Conv1D(8, 4)})})
    shapes = {name: view.shape for name, view in weight_views(module, "m.3").items()}
    assert list(shapes.items()) == [("m.3.b", (4, 6)), ("m.3.a.c", (8, 4))]
