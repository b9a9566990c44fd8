"""The masks of a pruned model: kept in a small file, and kept in force while the model is trained on.

A mask file is safetensors. For each pruned weight, under the weight's name in `state_dict()`: uint8 (ceil(numel / 8),), a bit a weight in
row-major order, the first one in a byte's highest bit, 1 = keep. The metadata's `shapes` maps the names to the weights' shapes, as JSON.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nnprune.model.weight_views import weight_views


class MaskFile:
    """Collects masks, a bit a weight, and writes them."""

    def __init__(self) -> None:
        self._bits: dict[str, np.ndarray] = {}
        self._shapes: dict[str, list[int]] = {}

    def add(self, name: str, weight: Tensor) -> None:
        """Add the mask of a weight: its nonzeros."""
        self._bits[name] = np.packbits((weight != 0).numpy())
        self._shapes[name] = list(weight.shape)

    def write(self, path: Path) -> None:
        """Raises OSError if the file cannot be written."""
        try:
            save_file(self._bits, path, {"shapes": json.dumps(self._shapes)})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """Name of a weight -> its mask, bool in the weight's shape, True = keep. Raises ValueError for a file of another kind."""
    try:
        with safe_open(path, "numpy") as file:
            shapes = json.loads(file.metadata()["shapes"])
            bits = {name: np.unpackbits(file.get_tensor(name), count=int(np.prod(shapes[name]))) for name in shapes}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no mask file ({error}); make one with nnprune-check DIR --masks FILE") from error
    return {name: torch.from_numpy(found).bool().view(shapes[name]) for name, found in bits.items()}


def keep_zeros(
    model: nn.Module, optimizer: torch.optim.Optimizer, masks: Mapping[str, Tensor] | None = None
) -> RemovableHandle:
    """Let weights that are zero stay zero: after each step of the optimizer their values are set to zero again.

    Args:
        model: on the device where it is trained; what it holds besides linears is trained freely.
        optimizer: of PyTorch, or derived from it.
        masks: name of a weight -> bool in its shape, True = keep, as from `read_masks`; None: those of all linears as they are now.
            Linears that are zero throughout, such as half of a LoRA adapter, are not pruned ones and have none.

    Returns:
        The handle of the hook; its `remove()` ends it.

    Raises:
        ValueError: a mask's weight is not in the model or of another shape, or nothing is pruned.
    """
    parameters = dict(model.named_parameters())
    if masks is None:
        names = {view.key for view in weight_views(model, "").values()}  # of experts in one tensor, that of all
        masks = {name: parameter.detach() != 0 for name, parameter in parameters.items() if name in names}
        masks = {name: mask for name, mask in masks.items() if mask.any() and not mask.all()}
    if not masks:
        raise ValueError("keep_zeros: no linear of the model has zeros; load a pruned model, or pass masks=read_masks(FILE)")
    zeros = []
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no weight of that name"
            raise ValueError(
                f"keep_zeros: {name} has a mask {tuple(mask.shape)}, the model has {found}; use the masks of this model"
            )
        zeros.append((parameters[name], ~mask.to(parameters[name].device)))

    def restore(*_: Any) -> None:
        with torch.no_grad():
            for parameter, is_zero in zeros:
                parameter.masked_fill_(is_zero, 0)

    restore()
    return optimizer.register_step_post_hook(restore)
