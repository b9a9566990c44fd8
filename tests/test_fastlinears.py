"""The faster forward of linears gives what PyTorch's gives, and is there only within a decoder layer's forward."""

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from nnprune.decoder import Decoder, run_layer
from nnprune.fastlinears import fast_linears
from nnprune.native import kernels

X = torch.randn(2, kernels.FEWEST_TOKENS // 2, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
W = X[0, :5].clone()

needs_kernel = pytest.mark.skipif(
    not kernels.has_linear(X, W, None), reason="this processor multiplies no bfloat16, or no C compiler"
)


@needs_kernel
@settings(max_examples=40)
@given(
    more=st.integers(0, 70),
    inputs=st.sampled_from([2, 30, 34, 512, 514, 1024, 1026, 1500, 2100]),
    outputs=st.integers(1, 100),
    has_bias=st.booleans(),
)
def test_products_are_those_of_pytorch(more: int, inputs: int, outputs: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(more)
    X, W, bias = (
        torch.randn(*shape, generator=generator).bfloat16()
        for shape in ((kernels.FEWEST_TOKENS + more, inputs), (outputs, inputs), (outputs,))
    )
    bias = bias if has_bias else None
    wanted = functional.linear(X.double(), W.double(), bias.double() if has_bias else None)
    found, theirs = kernels.linear(X, W, bias), functional.linear(X, W, bias)
    assert found.shape == wanted.shape and found.dtype == torch.bfloat16
    assert ((found - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5 * inputs**0.5).all()  # rounded once
    assert float((found != theirs).float().mean()) < 1e-3


@needs_kernel
def test_what_it_cannot_do_is_left_to_pytorch() -> None:
    assert kernels.has_linear(X, W, W[:, 0].clone())
    assert not kernels.has_linear(X[:1], W, None)  # too few tokens
    assert not kernels.has_linear(X.float(), W.float(), None)
    assert not kernels.has_linear(X, W, W[:, 0].float())
    assert not kernels.has_linear(X[..., :5].contiguous(), W[:, :5].contiguous(), None)
    assert not kernels.has_linear(X.mT.contiguous().mT, W, None)
    assert not kernels.has_linear(X, W.t().contiguous().t(), None)
    assert not kernels.has_linear(X, W[:, :4].contiguous(), None)


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_layers_are_served_and_left_as_they_were(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEWEST_TOKENS", 1)
    decoder = Decoder(FAMILIES[family]().bfloat16())
    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))
    hidden, calls, own, served = decoder.embed(ids), decoder.record_calls(ids), kernels.linear, []
    monkeypatch.setattr(kernels, "linear", lambda *args: (served.append(args[1].shape), own(*args))[1])
    ours = run_layer(decoder.layers[1], hidden, calls[1])
    served.clear()  # the first time small modules are tried too
    run_layer(decoder.layers[1], hidden, calls[1])
    assert len(served) == len(decoder.linears(1))
    monkeypatch.setattr(kernels, "has_linear", lambda *args: False)
    theirs = run_layer(decoder.layers[1], hidden, calls[1])
    assert len(served) == len(decoder.linears(1))
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@needs_kernel
def test_gradients_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    before, linear = nn.Linear.forward, nn.Linear(6, 5, bias=False).bfloat16()
    monkeypatch.setattr(kernels, "linear", lambda *args: pytest.fail("has no gradients"))
    with fast_linears():
        assert linear(X).requires_grad
    with torch.no_grad(), fast_linears(), pytest.raises(pytest.fail.Exception):
        linear(X)
    assert nn.Linear.forward is before
