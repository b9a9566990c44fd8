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


def make_model(name: str, **options: object) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
        return AutoModelForCausalLM.from_config(config).eval()

    return build


FAMILIES = {
    "opt": make_model("OPT", ffn_dim=64, word_embed_proj_dim=32),
    "opt_post_norm_projected": make_model("OPT", ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False),  # OPT-350M
    "llama": make_model("Llama", **GROUPED),
    "mistral": make_model("Mistral", sliding_window=8, **GROUPED),
    "qwen2": make_model("Qwen2", **GROUPED),
    "qwen3": make_model("Qwen3", head_dim=8, **GROUPED),
    "gemma": make_model("Gemma", head_dim=8, **GROUPED),
    "gemma2": make_model("Gemma2", **SLIDING, **MIXED, **GROUPED),
    "gemma3": make_model("Gemma3Text", **SLIDING, **MIXED, **GROUPED),
    "phi": make_model("Phi"),
    "phi3": make_model("Phi3", **GROUPED),
    "gpt2": make_model("GPT2", n_inner=64),
    "gpt_neox": make_model("GPTNeoX"),
    "bloom": make_model("Bloom"),
    "falcon": make_model("Falcon"),
    "falcon_alibi": make_model("Falcon", alibi=True, new_decoder_architecture=True),
    "olmo2": make_model("Olmo2", **GROUPED),
    "gptj": make_model("GPTJ", rotary_dim=4, n_inner=64),
    "stablelm": make_model("StableLm", **GROUPED),
    "starcoder2": make_model("Starcoder2", **GROUPED),
    "cohere": make_model("Cohere", **GROUPED),
    "granite": make_model("Granite", **GROUPED),
}
