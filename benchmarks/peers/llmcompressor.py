"""llm-compressor of the vLLM project (github.com/vllm-project/llm-compressor), through its `oneshot`.

Its sequential pipeline runs a decoder layer twice over all batches, as the authors' loop does; the batch is its default of
one sequence, and `lm_head` is left alone, as everywhere here.
"""

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

from benchmarks.peers.common import Run, Spec

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def modifier(spec: Spec) -> SparseGPTModifier | WandaPruningModifier:
    """The recipe for a method and a pattern. Its N:M counts the weights that go, ours those that stay."""
    kept, group = spec.nm or (0, 0)
    return MODIFIERS[spec.method](
        sparsity=spec.sparsity, mask_structure=f"{group - kept}:{group}", targets=["Linear"], ignore=["re:.*lm_head"]
    )


def main() -> None:
    """Run what the spec says."""
    run = Run()
    with run.stage("load"):
        model, ids = run.load()
        dataset = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    with run.stage("prune"):
        oneshot(
            model=model,
            dataset=dataset,
            recipe=modifier(run.spec),
            num_calibration_samples=len(ids),
            max_seq_length=ids.shape[1],
            shuffle_calibration_samples=False,
            pipeline="sequential",
        )
    run.finish(model, packages=("llmcompressor", "compressed-tensors"))


if __name__ == "__main__":
    main()
