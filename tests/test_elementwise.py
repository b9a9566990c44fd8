"""The faster forwards of norms and MLPs give what the modules give, and are there only within a decoder layer's forward."""

import pytest
import torch
from families import COMMON, FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from nnprune import elementwise
from nnprune.decoder import Decoder, run_layer
from nnprune.elementwise import fast_elementwise
from nnprune.native import kernels, library

needs_kernels = pytest.mark.skipif(library.library() is None, reason="this machine compiles no C")


def random(*shape: int, seed: int = 0) -> Tensor:
    return (4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def differing(found: Tensor, wanted: Tensor) -> float:
    """Share of numbers that differ, none by more than the last digit."""
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-6)
    return float((found != wanted).float().mean())


@needs_kernels
@settings(max_examples=30)
@given(tokens=st.integers(1, 50), width=st.integers(1, 20), eps=st.sampled_from([1e-6, 1e-2]))
def test_rms_norm(tokens: int, width: int, eps: float) -> None:
    norm = LlamaRMSNorm(16 * width, eps).bfloat16()
    norm.weight.data = random(16 * width, seed=1)
    X = random(tokens, 16 * width)
    assert differing(kernels.rms_norm(X, norm.weight, eps), norm(X)) < 0.02


@needs_kernels
def test_silu_product() -> None:
    gate, up = torch.linspace(-80, 80, 64 * 16).bfloat16().view(64, 16), random(64, 16)
    assert differing(kernels.silu_product(gate, up), silu(gate) * up) < 0.02


@needs_kernels
@settings(max_examples=30)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    tokens=st.integers(1, 9),
    width=st.sampled_from([32, 64, 96]),
    is_shared=st.booleans(),
    is_part=st.booleans(),
)
def test_rotation(batch: int, heads: int, tokens: int, width: int, is_shared: bool, is_part: bool) -> None:
    X = random(batch, tokens, heads, 2 * width if is_part else width).transpose(1, 2)[..., :width]
    cos, sin = (random(1 if is_shared else batch, tokens, width, seed=seed) / 4 for seed in (1, 2))
    wanted, _ = modeling_llama.apply_rotary_pos_emb(X, X, cos, sin)
    assert kernels.has_rotation(X, cos, sin)
    assert torch.equal(kernels.rotate(X, cos, sin), wanted)


@needs_kernels
def test_rotation_refuses_what_it_cannot_do() -> None:
    X, cos = random(2, 3, 5, 32), random(1, 5, 32)
    assert kernels.has_rotation(X, cos, cos)
    assert not kernels.has_rotation(X.float(), cos, cos)
    assert not kernels.has_rotation(X[0], cos, cos)
    assert not kernels.has_rotation(X[..., :16], cos[..., :16], cos[..., :16])
    assert not kernels.has_rotation(X, cos[:, :4], cos[:, :4])
    assert not kernels.has_rotation(X, cos.expand(2, 5, 32), cos.expand(2, 5, 32))
    assert not kernels.has_rotation(X.mT.contiguous().mT, cos, cos)


@needs_kernels
def test_what_is_not_finite_stays_so() -> None:
    X, weight = random(2, 32), torch.ones(32).bfloat16()
    X[0, 3] = torch.nan
    assert kernels.rms_norm(X, weight, 1e-6).isfinite().all(-1).tolist() == [False, True]
    assert kernels.silu_product(X, X).isfinite().flatten().tolist() == X.isfinite().flatten().tolist()


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_give_what_they_give(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(FAMILIES[family]().bfloat16())
    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))
    hidden, calls = decoder.embed(ids), decoder.record_calls(ids)
    ours = run_layer(decoder.layers[1], hidden, calls[1])
    for name in ("has_elementwise", "has_rotation"):
        monkeypatch.setattr(kernels, name, lambda *tensors: False)
    theirs = run_layer(decoder.layers[1], hidden, calls[1])
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@needs_kernels
@torch.no_grad()
def test_a_llama_is_served_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    for name in ("rms_norm", "rotate", "silu_product"):
        own = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, own=own: (served.append(name), own(*args))[1])
    config = LlamaConfig(**COMMON | {"num_attention_heads": 1})  # heads of 32 features
    decoder = Decoder(AutoModelForCausalLM.from_config(config).bfloat16().eval())
    layer, seen = decoder.layers[0], []
    layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    before = (LlamaRMSNorm.forward, LlamaMLP.forward, modeling_llama.apply_rotary_pos_emb)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    run_layer(layer, decoder.embed(ids), decoder.record_calls(ids)[0])
    assert served[-5:] == ["rms_norm", "rotate", "rotate", "rms_norm", "silu_product"]
    assert seen[0].shape == (1, 8, 64)
    assert before == (LlamaRMSNorm.forward, LlamaMLP.forward, modeling_llama.apply_rotary_pos_emb)
    served.clear()
    with fast_elementwise(layer):
        layer.float().input_layernorm(torch.ones(1, 8, 32))  # another dtype
    with torch.enable_grad(), fast_elementwise(layer.bfloat16()):
        layer.input_layernorm(random(1, 8, 32))
    assert not served


class Doubled(LlamaMLP):
    """Named as a gated MLP, and none."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@needs_kernels
def test_other_formulas_are_left_alone() -> None:
    assert elementwise._fast_norm(LlamaRMSNorm(64)) is not None
    assert elementwise._fast_norm(GemmaRMSNorm(64)) is None
    assert elementwise._fast_norm(nn.LayerNorm(64)) is None
    mlp = FAMILIES["llama"]().model.layers[0].mlp
    assert elementwise._fast_mlp(mlp) is not None
    mlp.__class__ = Doubled
    assert elementwise._fast_mlp(mlp) is None
    gelu = FAMILIES["gemma"]().model.layers[0].mlp
    assert elementwise._fast_mlp(gelu) is None
    assert elementwise._fast_rotation(modeling_llama.apply_rotary_pos_emb) is not None
    assert elementwise._fast_rotation(modeling_gpt_neox.apply_rotary_pos_emb) is not None
    assert elementwise._fast_rotation(modeling_cohere.apply_rotary_pos_emb) is None  # pairs of neighbours
    assert elementwise._fast_rotation(None) is None
