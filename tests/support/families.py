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
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 3 and not parameter.any():  # experts that transformers leaves to the checkpoint
                parameter.data.normal_(std=0.02)
        return model

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

EXPERTS = {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, **GROUPED}
NAMED = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, **GROUPED}
ROUTED = {
    **{"num_hidden_layers": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DELTA = {
    **{
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "head_dim": 8,
    },
    "layer_types": ["linear_attention", "full_attention"],
}
DBRX = {
    **{"d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
}

MIXTURES = {
    "mixtral": make_model("Mixtral", **EXPERTS),
    "qwen2_moe": make_model("Qwen2Moe", shared_expert_intermediate_size=32, **NAMED),
    "qwen3_moe": make_model("Qwen3Moe", head_dim=8, **NAMED),
    "gpt_oss": make_model("GptOss", head_dim=8, sliding_window=8, **EXPERTS),
    "olmoe": make_model("Olmoe", **NAMED),
    "flex_olmo": make_model("FlexOlmo", **NAMED),
    "phimoe": make_model("Phimoe", **EXPERTS),
    "deepseek_v2": make_model("DeepseekV2", **ROUTED, **LATENT),
    "deepseek_v3": make_model("DeepseekV3", **ROUTED, **LATENT),
    "granitemoe": make_model("GraniteMoe", **EXPERTS),
    "granitemoeshared": make_model("GraniteMoeShared", shared_intermediate_size=32, **EXPERTS),
    "jetmoe": make_model("JetMoe", kv_channels=8, **EXPERTS),
    "minimax": make_model("MiniMax", head_dim=8, block_size=16, **EXPERTS),
    "minimax_m2": make_model("MiniMaxM2", head_dim=8, **EXPERTS),
    "ernie4_5_moe": make_model(
        "Ernie4_5_Moe",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=32,
        moe_layer_start_index=1,
        num_hidden_layers=2,
        **GROUPED,
    ),
    "glm4_moe": make_model("Glm4Moe", head_dim=8, **GROUPED, **ROUTED),
    "llama4": make_model("Llama4Text", head_dim=8, intermediate_size_mlp=64, **EXPERTS),
    "dots1": make_model("Dots1", **GROUPED, **ROUTED),
    "dbrx": make_model("Dbrx", **DBRX),
    "hunyuan_moe": make_model("HunYuanMoEV1", moe_topk=2, head_dim=8, **NAMED),
    "afmoe": make_model("Afmoe", num_shared_experts=1, head_dim=8, **NAMED),
    "mimo_v2_flash": make_model("MiMoV2Flash", head_dim=8, v_head_dim=8, **GROUPED, **ROUTED),
    "solar_open": make_model("SolarOpen", head_dim=8, **GROUPED, **ROUTED),
    "exaone_moe": make_model("ExaoneMoe", head_dim=8, num_shared_experts=1, first_k_dense_replace=1, **NAMED),
    "cohere2_moe": make_model("Cohere2Moe", head_dim=8, num_shared_experts=1, **NAMED),
    "qwen3_next_moe": make_model("Qwen3Next", shared_expert_intermediate_size=32, **DELTA, **NAMED),
    "lfm2_moe": make_model("Lfm2Moe", num_dense_layers=1, layer_types=["conv", "full_attention"], **NAMED),
}
"""Mixtures of experts, of two layers and four experts."""

MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
MIXED_MAMBA = {"layer_types": ["mamba", "attention", "mamba"]}
SMALL_GEMMA = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER_INPUTS = {
    **SMALL_GEMMA,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
SSM = {"state_size": 8, "time_step_rank": 8}
KIMI = {"linear_head_dim": 8, "linear_num_heads": 4, **LATENT, "layer_types": ["linear_attention", "full_attention"]}

HYBRIDS = {
    "qwen3_next": make_model("Qwen3Next", mlp_only_layers=[0, 1], **DELTA, **NAMED),
    "qwen3_5": make_model("Qwen3_5Text", **DELTA, num_hidden_layers=2, **GROUPED),
    "olmo_hybrid": make_model("OlmoHybrid", **DELTA, num_hidden_layers=2, **GROUPED),
    "kimi_linear": make_model("KimiLinear", **KIMI, mlp_layer_types=["dense"] * 2, num_hidden_layers=2),
    "bailing_hybrid": make_model(
        "BailingHybrid",
        head_dim=8,
        num_key_value_heads=4,
        layer_group_size=2,
        **{**ROUTED, "first_k_dense_replace": 2},
        **LATENT,
    ),
    "falcon_h1": make_model("FalconH1", mamba_d_ssm=64, **MAMBA2, **GROUPED),
    "bamba": make_model("Bamba", attn_layer_indices=[1], **MAMBA2, **GROUPED),
    "granitemoehybrid": make_model(
        "GraniteMoeHybrid", num_local_experts=0, shared_intermediate_size=64, **MAMBA2, **MIXED_MAMBA, **GROUPED
    ),
    "jamba": make_model(
        "Jamba", num_experts=1, mamba_d_state=8, mamba_dt_rank=8, attn_layer_period=2, attn_layer_offset=1, **GROUPED
    ),
    "nemotron_h": make_model(
        "NemotronH",
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=8,
        head_dim=8,
        **GROUPED,
    ),
    "zamba": make_model(
        "Zamba", num_key_value_heads=4, layers_block_type=["hybrid", "mamba", "hybrid"], mamba_d_state=8, mamba_dt_rank=8
    ),
    "zamba2": make_model(
        "Zamba2",
        layers_block_type=["hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=4,
        chunk_size=8,
        adapter_rank=8,
    ),
    "lfm2": make_model("Lfm2", layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False, **GROUPED),
    "lfm3": make_model("Lfm3", head_dim=8, **GROUPED),
    "recurrent_gemma": make_model("RecurrentGemma", lru_width=32, attention_window_size=16, **GROUPED),
    "mamba": make_model("Mamba", **SSM),
    "mamba2": make_model("Mamba2", num_heads=4, head_dim=16, n_groups=1, chunk_size=8, **SSM),
    "falcon_mamba": make_model("FalconMamba", **SSM),
    "xlstm": make_model("xLSTM"),
    "gemma4_text": make_model("Gemma4Text", **PER_LAYER_INPUTS, num_hidden_layers=2, **GROUPED),
}
"""Dense decoders with layers of several kinds, or whose layers receive more than hidden states."""


@torch.no_grad()
def larger(model):
    """The model with weights so large that its logits differ when they are pruned."""
    for parameter in model.parameters():
        parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model
