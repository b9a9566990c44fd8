"""Weights that transformers makes of others when it loads a checkpoint, such as one tensor of the weights of all experts: made by its
own rules from the tensors of one layer, and turned back for a file.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

GetTensor = Callable[[str], Tensor]


@dataclass
class Conversion:
    """Weights that are made together.

    Args:
        target: the model's name of the first.
        converter: transformers' rule.
        sources: keys in the checkpoint, in the rule's order, each with the pattern of the rule that it matches.
        names: the model's names of all.
    """

    target: str
    converter: WeightConverter
    sources: list[tuple[str, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def make(self, model: PreTrainedModel, get: GetTensor) -> dict[str, Tensor]:
        """Name -> tensor, from the tensors that `get` gives for the keys of the sources. Raises what the rule raises."""
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.sources:
            converter.add_tensor(self.target, key, pattern, get(key))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def unmake(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Key in the checkpoint -> tensor, from the model's `tensors`. Raises ValueError where the rule gives others than the sources."""
        back = revert_weight_conversion(model, dict(tensors))
        keys = {key for key, _ in self.sources}
        prefix = f"{model.base_model_prefix}."
        for change in (str, lambda key: key.removeprefix(prefix), lambda key: prefix + key):
            if {change(key) for key in back} == keys:
                return {change(key): tensor for key, tensor in back.items()}
        raise ValueError(f"transformers makes {min(back)} of {self.target}, not {min(keys)}")


def renamed(model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, str], dict[str, Conversion]]:
    """What transformers' loader does with the `keys` of a checkpoint: key -> the model's name of the same tensor; and name -> the
    conversion that makes it, without `names` yet."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if pattern is None:
            names[key] = name
        else:
            conversions.setdefault(name, Conversion(name, by_pattern[pattern])).sources.append((key, pattern))
    return names, conversions
