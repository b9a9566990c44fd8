"""Our causal attention against the formula in float64, and that it is used only where it is meant to be."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nnprune import attention
from nnprune.attention import causal_attention, fast_attention
from nnprune.decoder import Decoder, LayerCall, run_layer
from nnprune.native import kernels

pytestmark = pytest.mark.usefixtures("native")

HAS_WIDE_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def random_heads(heads: int, shared: int, tokens: int, width: int, value_width: int, seed: int = 0) -> list[Tensor]:
    """Query, key and value of 2 rows, laid out as a model's projections leave them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads * shared, width), (heads, width), (heads, value_width))
    return [torch.randn(2, tokens, *shape, generator=generator).bfloat16().transpose(1, 2) for shape in shapes]


SHAPES = {"heads": st.integers(1, 3), "shared": st.integers(1, 3), "tokens": st.integers(1, 300)}


@settings(max_examples=40)
@given(
    **SHAPES,
    width=st.sampled_from([8, 23, 24, 64]),
    value_width=st.sampled_from([8, 16, 40, 80]),
    scaling=st.sampled_from([None, 0.3]),
)
def test_it_is_the_formula(heads: int, shared: int, tokens: int, width: int, value_width: int, scaling: float | None) -> None:
    query, key, value = random_heads(heads, shared, tokens, width, value_width)
    ours = causal_attention(query, key, value, scaling)
    wanted = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, scale=scaling, enable_gqa=True
    )
    assert ours.dtype == torch.bfloat16
    assert (ours - wanted).norm() < 0.004 * wanted.norm()


def test_what_takes_nearly_all_is_not_taken_for_less() -> None:
    """A first token's weight of nearly 1: rounded to bfloat16 after the division, it would be wrong by up to 0.002, in every row alike."""
    query, key, value = (tensor.clone() for tensor in random_heads(2, 1, 256, 64, 64))
    query[..., 0], key[..., 0, 0], value[:, :, 0] = 4.0, 20.0, 1.0
    wanted = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    theirs = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert (causal_attention(query, key, value) - wanted).norm() <= 1.05 * (theirs - wanted).norm()


def test_large_scores_are_not_rounded() -> None:
    """Scores near 100 in bfloat16 would be wrong by up to 0.25, and the weights by a quarter."""
    query, key, value = (8 * tensor for tensor in random_heads(2, 1, 256, 64, 64))
    wanted = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    assert (causal_attention(query, key, value) - wanted).norm() < 0.004 * wanted.norm()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of queries that our attention sees."""
    seen: list[tuple[int, ...]] = []

    def count(query: Tensor, *others: Tensor) -> Tensor:
        seen.append(tuple(query.shape))
        return causal_attention(query, *others)

    monkeypatch.setattr(attention, "causal_attention", count)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    return seen


def small_llama(**options: object) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **options)
    return Decoder(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


def layer_output(decoder: Decoder, tokens: int, call: LayerCall | None = None) -> Tensor:
    hidden = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(1)).to(decoder.model.dtype)
    call = call or decoder.record_calls(torch.zeros(1, tokens, dtype=torch.int64))[0]
    return run_layer(decoder.layers[0], hidden, call)


@torch.no_grad()
def test_a_layer_uses_it_and_leaves_transformers_as_it_was(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    decoder = small_llama()
    ours = layer_output(decoder, 256)
    assert calls == [(1, 4, 256, 16)]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    theirs = layer_output(decoder, 256)
    assert len(calls) == 1
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_short_sequences_masks_and_other_dtypes_are_left_to_pytorch(calls: list[tuple[int, ...]]) -> None:
    decoder = small_llama()
    with torch.no_grad():
        layer_output(decoder, 255)
        (call,) = decoder.record_calls(torch.zeros(1, 256, dtype=torch.int64))
        window = torch.ones(256, 256, dtype=torch.bool).tril().triu(-8)[None, None]
        layer_output(decoder, 256, LayerCall(call.args, {**call.kwargs, "attention_mask": window}))
        decoder.model.float()
        layer_output(decoder, 256)
    assert not calls


def test_gradients_come_from_kernels_or_from_pytorch(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As recovery asks for them: of float32 weights, with products in bfloat16."""
    decoder = small_llama()
    call = decoder.record_calls(torch.zeros(1, 256, dtype=torch.int64))[0]
    layer = decoder.layers[0].float()
    hidden = torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(1))
    wanted = torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(2))

    def gradients(mode: AbstractContextManager) -> Tensor:
        layer.zero_grad()
        with mode:
            output = run_layer(layer, hidden, call)
        (output * wanted).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])

    ours = gradients(torch.autocast("cpu", dtype=torch.bfloat16))
    query = torch.ones(1, 1, 1, 16, dtype=torch.bfloat16)
    assert len(calls) == kernels.has_attention_gradients(query, query, query, 1.0)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    theirs, exact = gradients(torch.autocast("cpu", dtype=torch.bfloat16)), gradients(nullcontext())
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm() < 0.02 * exact.norm()


@pytest.mark.skipif(not HAS_WIDE_VECTORS, reason="this CPU has no AVX-512")
def test_it_is_on_here() -> None:
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with fast_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not own
