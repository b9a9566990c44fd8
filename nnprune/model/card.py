"""The model card of a pruned model: the README.md that the hub and people read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT

TASKS = {"AutoModelForCausalLM": "text-generation", "AutoModelForImageTextToText": "image-text-to-text"}
"""Class that loads a model -> what the hub calls its task."""


def model_card(summary: Mapping[str, Any], architectures: Sequence[str], place: str = "DIR") -> str:
    """The card for the content of `pruning.json`, in Markdown with YAML in front; `architectures` are those of config.json, `place`
    is where the model is loaded from."""
    sees_images = set(architectures) & (set(IMAGE_TEXT.values()) - set(CAUSAL_LM.values()))
    loader = "AutoModelForImageTextToText" if sees_images else "AutoModelForCausalLM"
    base, config = summary["base_model"], summary["config"]
    name = base["path"] if base["commit"] else summary["model"]  # a local folder says nothing to others
    dataset = config["calibration"].get("dataset")
    front = {"library_name": "transformers", "pipeline_tag": TASKS[loader], "tags": ["nnprune", "pruned", "sparse"]}
    if base["commit"]:
        front |= {"base_model": name, "base_model_revision": base["commit"]}
    if dataset and not Path(dataset).exists():
        front["datasets"] = [dataset]
    calibration = ", ".join(
        f"{key} {value}" for key, value in config["calibration"].items() if value is not None and key != "_target_"
    )
    selection, chosen = summary["selection"], "the linears of the decoder layers"
    if selection:
        chosen = f"the {selection['linears']} of {selection['all_linears']} linears that were pruned"
    facts = {
        "Base model": f"{name}, " + (f"commit {base['commit']}" if base["commit"] else f"digest {base['digest']}"),
        "Command": f"`{summary['command']}`" if summary["command"] else "none, called from Python",
        "Method": f"{summary['pruner']} (`{config['pruner']['_target_']}`)",
        "Sparsity": summary["sparsity"],
        f"Zeros in {chosen}": _percent(summary["linear_sparsity"]),
        "Zeros in the whole model": _percent(summary["model_sparsity"]),
        "Calibration": calibration,
        "Computed in": summary["dtype"],
        "Versions": ", ".join(f"{package} {version}" for package, version in summary["versions"].items()),
        "nnprune's commit": f"{summary['commit']}{' with changes' if summary['dirty'] else ''}",
    }
    if quantization := summary.get("quantization"):
        facts["Kept weights"] = (
            f"{quantization['bits']} bits with a scale for {quantization['group_size']} inputs, {quantization['bits_per_weight']:.2f} bits "
            "per weight if they were packed; here stored as they are multiplied, with the scales in quantization.safetensors"
        )
    figures = [f"| {key} | {summary['dense_metrics'].get(key)} | {value} |" for key, value in summary["metrics"].items()]
    trust = ", trust_remote_code=True" if config["model"].get("trust_remote_code") else ""
    lines = [
        *("---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""),
        *(f"# {name}, pruned to {summary['sparsity']}", ""),
        f"{f'[{name}](https://huggingface.co/{name})' if base['commit'] else name} after pruning by nnprune.",
        "Names, files and settings are those of the base model. Zeros are stored dense: the files are as large as the base model's,",
        "and nothing is faster unless a program makes use of the zeros.",
        *("", *(f"- {fact}: {value}" for fact, value in facts.items()), ""),
        *(("| metric | base model | this model |", "| :--- | ---: | ---: |", *figures, "") if figures else ()),
        *("Load it:", "", "```python", f"from transformers import {loader}, AutoTokenizer", ""),
        f'model = {loader}.from_pretrained("{place}"{trust})',
        *(f'tokenizer = AutoTokenizer.from_pretrained("{place}"{trust})', "```", ""),
        "Verify zeros and untouched tensors with `nnprune-check DIR`. The whole record is in `pruning.json`.",
    ]
    return "\n".join(lines) + "\n"


def _percent(fraction: float | None) -> str:
    return "--" if fraction is None else f"{fraction:.4%}"
