"""A model of shapes and dtypes without weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers goes to the meta device; buffers, which no checkpoint may hold, stay real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:
            return None  # the same object where modules share it
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def recompute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds as transformers' loader does: in float32, whatever the dtype of the model."""
    # Parts that are models of their own know how; they come after the model that they are in.
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    owners = {module: owner for owner in models for module in owner.modules()}
    for module, owner in owners.items():
        if module._non_persistent_buffers_set:
            owner._init_weights(module)


def keep_float32(model: PreTrainedModel) -> None:
    """Let the skeleton have those parameters in float32 that transformers loads so whatever the dtype."""
    if not (plan := model._get_dtype_plan(model.dtype)):
        return
    rule = build_glob_alternation(list(plan))[0]
    for name, parameter in model.named_parameters():
        if rule.search(name):
            parameter.data = parameter.data.to(torch.float32)
