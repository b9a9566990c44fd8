"""Random combinations of settings, and what a saved model must be whatever they are."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nnprune.evaluation import Evaluation
from nnprune.model.decoder import Decoder
from nnprune.model.weight_views import WeightView
from nnprune.patterns import NM, parse_pattern
from nnprune.records import RunRecord

PRUNERS = (
    *("magnitude", "wanda", "ria", "dsnot", "swaps", "sparsegpt", "sparsegpt_nnpruning", "admm", "alps"),
    *("wanda_refit", "sparsegpt_refit", "admm_refit", "best_fast", "best"),
)
FAMILIES = ("opt", "opt_post_norm_projected", "llama", "qwen2", "gemma2", "gpt2", "bloom", "falcon", "phi", "olmo2")
SEQ_LEN, WINDOWS = 32, 4


@dataclass
class Combination:
    """A model, and the settings of a run beyond those of the texts."""

    family: str
    stored: str  # dtype of the checkpoint
    has_units: bool  # whether the CPU is taken for one that multiplies bfloat16
    overrides: list[str]


def draw(seed: int) -> Combination:
    """The combination of a seed; settings that exclude each other do not meet."""
    rng = random.Random(seed)
    pruner, propagate = rng.choice(PRUNERS), rng.choice(("pruned", "dense", "sequential"))
    overrides = [f"pruner={pruner}", f"sparsity={rng.choice(('0.3', '0.5', '0.7', '2:4', '4:8', '1:4'))}"]
    if not pruner.startswith("best"):
        overrides.append(f"propagate={propagate}")
        overrides.append(f"update={rng.choice(('none', 'refit'))}")
        if propagate != "dense":
            overrides.append(f"target={rng.choice(('dense', 'asymmetric'))}")
            overrides += rng.choice(([], ["recover=next_layer"], ["recover=model", "recover.epochs=1"]))
        overrides += rng.choice(([], [], ["recover=layer"], ["recover=window"])) if "recover" not in overrides[-1] else []
    if "recover=layer" in overrides:
        overrides.append("recover.epochs_after=1")
    if pruner == "best" or "recover=window" in overrides:
        overrides += ["recover.epochs_after=1", "recover.logits_epochs=1"]
    if "recover=next_layer" in overrides:
        overrides.append("recover.epochs_before=1")
    overrides.append(f"update.bias={rng.choice(('auto', 'auto', 'true', 'false'))}")
    overrides.append(f"allocation={rng.choice(('uniform', 'uniform', 'owl', 'dlp', 'by_error'))}")
    overrides.append(f"runtime.layers={rng.choice(('host', 'disk'))}")
    overrides.append(f"runtime.activations={rng.choice(('auto', 'host', 'disk'))}")
    overrides.append(f"runtime.batch_tokens={rng.choice((32, 64, 1000))}")
    return Combination(
        rng.choice(FAMILIES), rng.choice(("float32", "bfloat16", "bfloat16", "float16")), rng.random() < 0.5, overrides
    )


def faults(record: RunRecord, dense: Path, saved: Path, text: Path) -> list[str]:
    """What is wrong with a saved model, seen with plain transformers: counts, untouched tensors, both perplexities."""
    computing = getattr(torch, record.dtype)
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval() for folder in (dense, saved))
    found = _wrong_counts(record, after)
    views = _views(after)
    is_tuned = bool(record.recovered)
    corrected = {f"{linear['name']}.bias" for linear in record.per_linear if "bias_change" in linear}
    state = after.state_dict()
    for name, tensor in before.state_dict().items():
        if tensor.dtype != state[name].dtype:
            found.append(f"{name}: saved as {state[name].dtype}")
        is_pruned = name.removesuffix(".weight") in views or name in corrected
        if not is_pruned and not is_tuned and not torch.equal(tensor, state[name]):
            found.append(f"{name}: changed, though it is no linear of a decoder layer")
    ids = Evaluation({}, SEQ_LEN, WINDOWS, str(text)).token_ids(AutoTokenizer.from_pretrained(saved))["text"]
    tolerance = 1e-4 if record.dtype == "float32" else 2e-2
    for model, metrics in ((before, record.dense_metrics), (after, record.metrics)):
        plain = plain_perplexity(model.to(computing), ids)
        if not math.isclose(plain, metrics["text_perplexity"], rel_tol=tolerance):
            found.append(f"perplexity {metrics['text_perplexity']}, with plain transformers {plain}")
    return found


@torch.no_grad()
def plain_perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """exp of the mean loss of ids (N, T) but each row's first, by one forward of the whole model."""
    losses = [cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:]).double() for row in ids]
    return math.exp(torch.stack(losses).mean())


def _views(model: PreTrainedModel) -> dict[str, WeightView]:
    decoder = Decoder(model)
    return {name: view for index in range(len(decoder.layers)) for name, view in decoder.weights(index).items()}


def _wrong_counts(record: RunRecord, model: PreTrainedModel) -> list[str]:
    """Linears whose zeros are not as many as their pattern in the record asks for."""
    views, found = _views(model), []
    if {report["name"] for report in record.per_linear} != views.keys():
        found.append("the record does not tell of all linears")
    for report in record.per_linear:
        weight, pattern = views[report["name"]].read(), parse_pattern(report["pattern"])
        zeros, (num_outputs, num_inputs) = int((weight == 0).sum()), weight.shape
        if isinstance(pattern, NM):
            kept = weight.bool().unflatten(1, (-1, pattern.m)).sum(-1)
            least, most = pattern.sparsity * weight.numel(), zeros if int(kept.max()) <= pattern.n else -1
        else:  # exact in each comparison group: the matrix, a slab of columns, a row, or a row of a slab
            columns = min(record.config["pruner"].get("mask_columns") or num_inputs, num_inputs)
            least = pattern.num_zeros(weight.numel())
            most = num_outputs * (num_inputs // columns * pattern.num_zeros(columns) + pattern.num_zeros(num_inputs % columns))
        slack = 0.002 * weight.numel() if record.dtype != "float32" or record.recovered else 0  # values that round to zero
        if not least <= zeros <= most + slack:
            found.append(f"{report['name']}: {zeros} zeros, {pattern} asks for {least} to {most}")
    return found
