"""The scales of a saved model whose kept weights are on a grid: `quantization.safetensors`, linear name -> scales (O, N).

They are computed from the stored weights, so that nothing but these has to survive a kill.

Letters: O output features, I input features, N groups of a row.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from nnprune.model.decoder import Decoder
from nnprune.records import RunRecord
from nnprune.solvers.quantization import Quantization

SCALES = "quantization.safetensors"


def grid_of(quantization: Mapping[str, Any]) -> Quantization:
    """From the entry `quantization` of a record."""
    return Quantization(quantization["bits"], quantization["group_size"])


def pruned_linears(per_linear: Iterable[Mapping[str, Any]]) -> set[str]:
    """The names of those linears of a record that were pruned, and so rounded."""
    return {linear["name"] for linear in per_linear if linear["pattern"] != "dense"}


def scales_of(decoder: Decoder, layers: Sequence[Path], record: RunRecord) -> dict[str, Tensor]:
    """Linear name -> scales (O, N) of each pruned linear, in its stored dtype; empty if nothing was rounded.

    `layers` are the files of the pruned decoder layers. Raises ValueError, naming the linear, for a weight that is on no grid.
    """
    if not record.quantization:
        return {}
    grid, pruned = grid_of(record.quantization), pruned_linears(record.per_linear)
    found: dict[str, Tensor] = {}
    for name, weight_OI in _weights(decoder, layers):
        if name in pruned:
            try:
                found[name] = grid.scales_of(weight_OI)
            except ValueError as error:
                raise ValueError(f"save=true: {name}: {error}") from None
    return found


def _weights(decoder: Decoder, layers: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and weight (O, I) of each linear that is in the files of decoder layers."""
    for index, path in enumerate(layers):
        held = tensor = None
        with safe_open(path, "pt") as file:
            for name, view in decoder.weights(index).items():
                if view.key != held:  # all experts of a layer share one
                    held, tensor = view.key, file.get_tensor(view.key)
                yield name, view.within(tensor)
