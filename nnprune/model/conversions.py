"""Weights that transformers makes of other tensors as it loads a checkpoint, such as the experts of a layer in one, and back again."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)


@dataclass
class Conversion:
    """One of transformers' conversions, which makes one or more weights of tensors of a checkpoint.

    Args:
        model: names and configuration.
        converter: what transformers computes them with.
        name: of the first weight.
        bare: what a key, or a weight, is called when only renamed, without the prefix that some checkpoints lack.
        patterns: key of the checkpoint -> the pattern of the converter that it matches.
        key_shapes: of these tensors.
    """

    model: PreTrainedModel
    converter: WeightConverter
    name: str
    bare: Callable[[str], str]
    patterns: dict[str, str] = field(default_factory=dict)
    key_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the weights; none if the tensors do not fit together."""
        try:
            made = self.apply({key: torch.empty(shape, device="meta") for key, shape in self.key_shapes.items()})
        except (RuntimeError, ValueError, IndexError, KeyError):
            return {}
        return {name: tuple(tensor.shape) for name, tensor in made.items()}

    def apply(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> weight, made of key -> tensor."""
        converter = deepcopy(self.converter)
        for key in sorted(self.patterns, key=dot_natural_key):
            converter.add_tensor(self.name, key, self.patterns[key], tensors[key])
        return self._convert(converter, self.name)

    def revert(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Key -> tensor, of name -> weight. Raises ValueError if it cannot be reverted."""
        converter, keys = self.converter.reverse_transform(), {self.bare(key): key for key in self.patterns}
        first = ""
        for name in sorted(weights, key=dot_natural_key):
            renamed, pattern = converter.rename_source_key(name)
            first = first or renamed
            converter.add_tensor(first, name, pattern, weights[name])
        tensors = {keys.get(self.bare(name)): tensor for name, tensor in self._convert(converter, first).items()}
        if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != self.key_shapes:
            raise ValueError(f"{self.name} cannot be taken apart again")
        return tensors

    def can_revert(self) -> bool:
        """Whether `revert` gives the tensors that the weights were made of."""
        try:
            self.revert({name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()})
        except (RuntimeError, ValueError, IndexError, KeyError):
            return False
        return True

    def _convert(self, converter: WeightConverter, name: str) -> dict[str, Tensor]:
        made = converter.convert(name, model=self.model, config=self.model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


def plan_loading(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], dict[str, Conversion]]:
    """Key -> name of the weight that is just a tensor of the checkpoint, and key -> conversion that it is used in, as transformers' loader
    does it. `shapes` are those of the tensors, by key."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix

    def bare(key: str) -> str:
        return apply_renamings(key, renamings).removeprefix(f"{prefix}.")

    names: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    by_name: dict[str, Conversion] = {}
    for key, shape in shapes.items():
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if pattern is None or name not in state:
            names[key] = name
            continue
        made = by_name.setdefault(name, Conversion(model, by_pattern[pattern], name, bare))
        made.patterns[key], made.key_shapes[key] = pattern, shape
        conversions[key] = made
    return names, conversions
