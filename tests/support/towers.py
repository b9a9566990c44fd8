"""Tiny random models with a text decoder that also see images, and models that are refused."""

from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedModel

from support.families import COMMON, DELTA, GROUPED, PER_LAYER_INPUTS, SMALL_GEMMA, VOCAB_SIZE, make_model

TEXT = {**COMMON, **GROUPED, "num_hidden_layers": 2}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
    "num_hidden_layers": 2,  # as deep as the text decoder
    **{"image_size": 28, "patch_size": 14, "num_channels": 3},
}
QWEN_VISION = {
    **{"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32},
    **{"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16},
}
GLM_VISION = {**QWEN_VISION, "image_size": 28, "patch_size": 14}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
GEMMA3N = {
    **{"intermediate_size": [64] * 2, **SMALL_GEMMA, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 2},
    **{"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8, "altup_num_inputs": 4, "laurel_rank": 8},
}


def make_tower(
    name: str, vision: dict | None = VISION, text: dict | None = None, **options: object
) -> Callable[[], PreTrainedModel]:
    """A text decoder within a model that also sees images; `text` adds to the text decoder's configuration."""

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")
        text_class = type(config().text_config)
        config = config(
            text_config={**TEXT, **(text or {}), "model_type": text_class.model_type},
            **({} if vision is None else {"vision_config": vision}),
            image_token_id=3,
            image_token_index=3,
            video_token_id=4,
            **options,
        )
        return AutoModelForImageTextToText.from_config(config).eval()

    return build


TOWERS = {
    "llava": make_tower("Llava"),
    "llava_next": make_tower("LlavaNext"),
    "llava_onevision": make_tower("LlavaOnevision"),
    "qwen2_vl": make_tower("Qwen2VL", {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32}, MROPE),
    "qwen2_5_vl": make_tower("Qwen2_5_VL", QWEN_VISION, MROPE),
    "qwen3_vl": make_tower("Qwen3VL", {**QWEN_VISION, "deepstack_visual_indexes": [0]}, {"head_dim": 8, **MROPE}),
    "qwen3_5": make_tower("Qwen3_5", QWEN_VISION, {**DELTA, **MROPE}),
    "gemma3": make_tower("Gemma3", text=SMALL_GEMMA, mm_tokens_per_image=1),
    "gemma4": make_tower("Gemma4", None, PER_LAYER_INPUTS),
    "mistral3": make_tower("Mistral3", text={"head_dim": 8}),
    "idefics3": make_tower("Idefics3"),
    "smolvlm": make_tower("SmolVLM"),
    "internvl": make_tower("InternVL", {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}),
    "aya_vision": make_tower("AyaVision", text={"head_dim": 8}),
    "cohere2_vision": make_tower("Cohere2Vision", text={"head_dim": 8}, alignment_intermediate_size=32),
    "glm4v": make_tower("Glm4v", GLM_VISION, {"rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}),
    "lfm2_vl": make_tower(
        "Lfm2Vl", {**VISION, "num_patches": 4}, {"layer_types": ["conv", "full_attention"]}, projector_hidden_size=32
    ),
    "lighton_ocr": make_tower("LightOnOcr", text={"head_dim": 8}),
}
"""Text decoders within models that see images."""

REFUSED = {
    "paligemma": (make_tower("PaliGemma", text={"head_dim": 8}), "its tokens see later ones"),
    "mllama": (make_tower("Mllama", text={"cross_attention_layers": [1]}), "calls 1 of its 2 layers"),
    "rwkv": (make_model("Rwkv", context_length=64, rescale_every=2), "do not give the model's own logits"),
    "gemma3n_text": (make_model("Gemma3nText", num_hidden_layers=2, **GROUPED, **GEMMA3N), "hidden states (4, 2, 16, 32)"),
    "gemma4_shared_kv": (
        make_model(
            "Gemma4Text",
            **{**PER_LAYER_INPUTS, "layer_types": ["sliding_attention", "full_attention"] * 2},
            **{**GROUPED, "num_kv_shared_layers": 2, "num_hidden_layers": 4},
        ),
        "layer 2 cannot be run by itself",
    ),
}
"""Families that can't be pruned layer by layer, with a part of the reason that is given."""
