"""The kernel of causal attention against the formula in float64, and that models use it only where it is meant to be."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import FAMILIES, VOCAB_SIZE
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nnprune.kernels import attention as kernel
from nnprune.kernels import library
from nnprune.model import attention
from nnprune.model.attention import NAME, attend, use_kernel
from nnprune.model.decoder import Decoder, LayerCall, run_layer
from nnprune.model.loading import ModelSource

CPU = torch.device("cpu")
needs_kernel = pytest.mark.skipif(
    not hasattr(library.library(), "attention"), reason="this CPU has no kernel of attention, or no compiler"
)


def random_heads(heads: int, shared: int, tokens: int, width: int, value_width: int, seed: int = 0) -> list[Tensor]:
    """Query, key and value of 2 rows, laid out as a model's projections leave them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads * shared, width), (heads, width), (heads, value_width))
    return [torch.randn(2, tokens, *shape, generator=generator).bfloat16().transpose(1, 2) for shape in shapes]


@needs_kernel
@settings(max_examples=40)
@given(
    heads=st.integers(1, 3),
    shared=st.integers(1, 3),
    tokens=st.integers(1, 300),
    width=st.sampled_from([8, 24, 64]),
    value_width=st.sampled_from([16, 48, 80]),
    scaling=st.sampled_from([0.125, 0.3]),
)
def test_it_is_the_formula(heads: int, shared: int, tokens: int, width: int, value_width: int, scaling: float) -> None:
    query, key, value = random_heads(heads, shared, tokens, width, value_width)
    ours = kernel.causal_attention(query, key, value, scaling)
    wanted = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, scale=scaling, enable_gqa=True
    )
    assert ours.dtype == torch.bfloat16
    assert (ours - wanted).norm() < 0.004 * wanted.norm()


@needs_kernel
def test_what_takes_nearly_all_is_not_taken_for_less() -> None:
    """A first token's weight of nearly 1: rounded to bfloat16 after the division, it would be wrong by up to 0.002, in every row alike."""
    query, key, value = (tensor.clone() for tensor in random_heads(2, 1, 256, 64, 64))
    query[..., 0], key[..., 0, 0], value[:, :, 0] = 4.0, 20.0, 1.0
    wanted = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    theirs = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert (kernel.causal_attention(query, key, value, 0.125) - wanted).norm() <= 1.05 * (theirs - wanted).norm()


@needs_kernel
def test_large_scores_are_not_rounded() -> None:
    """Scores near 100 in bfloat16 would be wrong by up to 0.25, and the weights by a quarter."""
    query, key, value = (8 * tensor for tensor in random_heads(2, 1, 256, 64, 64))
    wanted = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    assert (kernel.causal_attention(query, key, value, 0.125) - wanted).norm() < 0.004 * wanted.norm()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of queries that the kernel sees; where there is none, PyTorch stands in for it."""
    seen: list[tuple[int, ...]] = []
    own = kernel.causal_attention

    def count(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        seen.append(tuple(query.shape))
        if hasattr(library.library(), "attention"):
            return own(query, key, value, scaling)
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)

    def has_attention(*tensors_and_scaling: object) -> bool:
        return all(tensor.dtype == torch.bfloat16 and tensor.device == CPU for tensor in tensors_and_scaling[:3])

    class Library:
        attention = None

    if not hasattr(library.library(), "attention"):
        monkeypatch.setattr(kernel, "has_attention", has_attention)
        monkeypatch.setattr(attention, "library", Library)
    monkeypatch.setattr(kernel, "causal_attention", count)
    return seen


def small_llama(dtype: torch.dtype = torch.bfloat16) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2), dtype=dtype)
    return Decoder(model)


def layer_output(decoder: Decoder, tokens: int, call: LayerCall | None = None) -> Tensor:
    hidden = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(1)).to(decoder.model.dtype)
    call = call or decoder.record_calls(torch.zeros(1, tokens, dtype=torch.int64))[0]
    return run_layer(decoder.layers[0], hidden, call)


@torch.no_grad()
def test_a_model_that_asks_for_it_uses_it(calls: list[tuple[int, ...]]) -> None:
    decoder = small_llama()
    theirs = layer_output(decoder, 256)
    assert not calls
    use_kernel(decoder.model, CPU)
    ours = layer_output(decoder, 256)
    assert calls == [(1, 4, 256, 16)]
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
    layer_output(small_llama(), 256)
    assert len(calls) == 1, "other models are left alone"
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, "cpu"), (torch.float16, "cpu"), (torch.bfloat16, "cuda")])
def test_only_models_in_bfloat16_on_a_cpu_ask_for_it(calls: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> None:
    decoder = small_llama(dtype)
    use_kernel(decoder.model, torch.device(device))
    assert decoder.model.config._attn_implementation == "sdpa"
    layer_output(decoder, 256)
    assert not calls


def test_no_model_asks_for_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "library", lambda: None)
    decoder = small_llama()
    use_kernel(decoder.model, CPU)
    assert decoder.model.config._attn_implementation == "sdpa"


def test_short_sequences_masks_other_dtypes_and_gradients_are_left_to_pytorch(calls: list[tuple[int, ...]]) -> None:
    decoder = small_llama()
    use_kernel(decoder.model, CPU)
    with torch.no_grad():
        layer_output(decoder, 255)
        (call,) = decoder.record_calls(torch.zeros(1, 256, dtype=torch.int64))
        window = torch.ones(256, 256, dtype=torch.bool).tril().triu(-8)[None, None]
        layer_output(decoder, 256, LayerCall(call.args, {**call.kwargs, "attention_mask": window}))
    decoder.layers.requires_grad_(True)
    layer_output(decoder, 256).sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.layers[0].parameters())
    with torch.no_grad():
        decoder.model.float()
        layer_output(decoder, 256)
    assert not calls


@pytest.mark.parametrize("option", [{"dropout": 0.5}, {"is_causal": False}, {"position_bias": torch.zeros(1, 2, 256, 256)}])
def test_other_options_are_left_to_pytorch(calls: list[tuple[int, ...]], option: dict[str, object]) -> None:
    query, key, value = random_heads(2, 1, 256, 16, 16)
    option = {name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in option.items()}
    torch.manual_seed(0)
    found, _ = attend(torch.nn.Module(), query, key, value, None, scaling=0.25, **option)
    torch.manual_seed(0)
    wanted, _ = sdpa_attention_forward(torch.nn.Module(), query, key, value, None, scaling=0.25, **option)
    assert torch.equal(found, wanted)
    assert not calls


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_computes_what_it_did(family: str, calls: list[tuple[int, ...]]) -> None:
    """Masks are made as for "sdpa"; families whose attention is not exchangeable stay as they are."""
    model = FAMILIES[family]().bfloat16()
    ids = torch.randint(VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))
    wanted, before = model(ids).logits, model.config._attn_implementation
    use_kernel(model, CPU)
    assert torch.equal(model(ids).logits, wanted)
    is_exchangeable = before == "sdpa" and model._can_set_attn_implementation()
    assert model.config._attn_implementation == (NAME if is_exchangeable else before)


def test_a_saved_configuration_does_not_name_it(calls: list[tuple[int, ...]], tmp_path: Path) -> None:
    model = small_llama().model
    use_kernel(model, CPU)
    assert model.config._attn_implementation == NAME
    copy.deepcopy(model.config).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "model")
    for folder in (tmp_path, tmp_path / "model"):
        assert "attn" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("make", ["load", "random", "skeleton"])
def test_a_configuration_does_not_choose_the_attention(implementation: str, make: str, tmp_path: Path) -> None:
    small_llama().model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_implementation": implementation}))
    source = ModelSource(str(tmp_path))
    model = getattr(source, make)(source.config())
    assert model.config._attn_implementation == "sdpa"
    model.config.save_pretrained(tmp_path / "saved")
    assert "attn" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_configuration_that_asks_for_weights_can_be_saved(tmp_path: Path) -> None:
    small_llama().model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "output_attentions": True}))
    source = ModelSource(str(tmp_path))
    source.load(source.config()).config.save_pretrained(tmp_path / "saved")
    assert "attn" not in (tmp_path / "saved" / "config.json").read_text()
