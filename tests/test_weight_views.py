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
