"""Tiny random models of many architectures, every width a multiple of 8."""

from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 264
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
SLIDING = {"sliding_window": 8, "head_dim": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def _make(name: str, **options: object) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
        return AutoModelForCausalLM.from_config(config).eval()

    return build


FAMILIES = {
    "opt": _make("OPT", ffn_dim=64, word_embed_proj_dim=32),
    "opt_post_norm_projected": _make("OPT", ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False),  # OPT-350M
    "llama": _make("Llama", **GROUPED),
    "mistral": _make("Mistral", sliding_window=8, **GROUPED),
    "qwen2": _make("Qwen2", **GROUPED),
    "qwen3": _make("Qwen3", head_dim=8, **GROUPED),
    "gemma": _make("Gemma", head_dim=8, **GROUPED),
    "gemma2": _make("Gemma2", **SLIDING, **MIXED, **GROUPED),
    "gemma3": _make("Gemma3Text", **SLIDING, **MIXED, **GROUPED),
    "phi": _make("Phi"),
    "phi3": _make("Phi3", **GROUPED),
    "gpt2": _make("GPT2", n_inner=64),
    "gpt_neox": _make("GPTNeoX"),
    "bloom": _make("Bloom"),
    "falcon": _make("Falcon"),
    "falcon_alibi": _make("Falcon", alibi=True, new_decoder_architecture=True),
    "olmo2": _make("Olmo2", **GROUPED),
    "gptj": _make("GPTJ", rotary_dim=4, n_inner=64),
    "stablelm": _make("StableLm", **GROUPED),
    "starcoder2": _make("Starcoder2", **GROUPED),
    "cohere": _make("Cohere", **GROUPED),
    "granite": _make("Granite", **GROUPED),
}
