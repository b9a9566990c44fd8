"""Causal attention in bfloat16 by the C kernel, as an attention implementation of transformers.

The kernel exists for CPUs with AVX-512 bfloat16 but no AMX, where PyTorch's own reaches an eighth of the peak rate. Inputs that it
does not support go to transformers' "sdpa".

Letters: B batch, H heads, K heads of keys and values, T tokens, E features of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nnprune.kernels import attention
from nnprune.kernels.library import library

NAME = "nnprune_sdpa"  # because it contains "sdpa", transformers refuses it for models without sdpa support
SHORTEST = 256  # sequence length: below it PyTorch's kernel is as fast


def use_kernel(model: PreTrainedModel, device: torch.device) -> None:
    """Switch a model that will compute on `device` to `attend`, if this machine has the kernel and the model uses "sdpa"."""
    if device.type != "cpu" or model.dtype != torch.bfloat16 or not hasattr(library(), "attention"):
        return
    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of one layer, with the signature of transformers' attention functions, options as in `sdpa_attention_forward`.

    `query` is (B, H, T, E), `key` and `value` (B, K, T, E); an `attention_mask` of None means plain causal attention. Returns
    (B, T, H, E), and None in place of the attention weights.
    """
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None or not _applies(module, query, key, value, scaling, options):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return attention.causal_attention(query, key, value, scaling).transpose(1, 2), None


def _applies(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, options: dict[str, Any]) -> bool:
    """Whether the kernel supports these inputs and options; masks are checked by the caller."""
    is_causal = options.get("is_causal")
    return (
        attention.has_attention(query, key, value, scaling)
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and query.shape[2] == key.shape[2] == value.shape[2] >= SHORTEST
        and query.shape[1] % key.shape[1] == 0
        and not options.get("dropout")
        and not any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)))
    )
