"""The nn-pruning toolkit: one file, pruning.py, with pruner classes that prune an OPT as a whole.

It hands on the outputs of dense layers, so its perplexity is another. Three things are adapted, none of them its method:
it asks for CUDA by name, which becomes the CPU where there is none; it takes the first entry of what a decoder layer
returns, which in transformers 5 is no tuple any more but the hidden states; and its SparseGPT refuses widths that its
blocks of 128 do not divide, for which it has an option.
"""

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from benchmarks.peers.common import Run, Spec, decoder_layers

BATCH_SIZE = 16
"""Sequences in one forward: the toolkit's default."""


class TorchOnCPU:
    """Stands in for the module torch within the toolkit where there is no CUDA: same names, but no CUDA and nothing pinned."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, name: str) -> torch.device:
        """The CPU, whatever was asked for."""
        return torch.device("cpu")

    def empty(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        """torch.empty; pinning memory takes a device to pin it for."""
        return torch.empty(*args, **kwargs)


def as_tuple(layer: nn.Module) -> None:
    """Let a decoder layer return a tuple that starts with the hidden states."""
    own_forward = layer.forward

    def forward(*args: Any, **kwargs: Any) -> tuple:
        output = own_forward(*args, **kwargs)
        return output if isinstance(output, tuple) else (output,)

    layer.forward = forward


def make_pruner(toolkit: Any, spec: Spec, model: PreTrainedModel) -> Any:
    """The toolkit's own pruner for the method."""
    if spec.method == "wanda":
        return toolkit.WandaPruner()
    widths = [module.in_features for module in decoder_layers(model).modules() if isinstance(module, nn.Linear)]
    block_size = 128 if all(width % 128 == 0 for width in widths) else 64
    return toolkit.SparseGPTPruner(block_size=block_size)


def main() -> None:
    """Run what the spec says."""
    run = Run()
    sys.path.insert(0, run.spec.options["checkout"])
    toolkit = importlib.import_module("pruning")
    if run.spec.device == "cpu":
        toolkit.torch = TorchOnCPU()
    with run.stage("load"):
        model, ids = run.load()
        for layer in decoder_layers(model):
            as_tuple(layer)
        batches = DataLoader(
            ids, batch_size=BATCH_SIZE, collate_fn=lambda rows: {"input_ids": torch.stack(rows)}, pin_memory=False
        )
    sparsity = run.spec.pattern if run.spec.nm else run.spec.sparsity
    pruner = make_pruner(toolkit, run.spec, model)
    with run.stage("prune"):
        pruner.prune_model(model, sparsity=sparsity, calib_dataloader=batches, pbar=False)
    run.finish(model, note="hands on dense activations")


if __name__ == "__main__":
    main()
