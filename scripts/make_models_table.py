"""Rewrites the table of docs/models.md: prunes a tiny random model of each family and checks what is saved.

    python scripts/make_models_table.py                    all families, about ten minutes
    python scripts/make_models_table.py mamba llava        prints the rows of these

Each model is pruned to 2:4 with Wanda, once with layers in memory and once on disk. A family is in the table as pruned if
transformers loads the saved model with no missing or unexpected key, all else is bit for bit what it was, and both perplexities, of
the dense and of the pruned model, are those of the plain model. Needs a checkout: the models are those of the tests.
"""

import argparse
import io
import logging
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from transformers import PreTrainedModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import byte_tokenizer, compose_config  # noqa: E402
from support.families import FAMILIES, HYBRIDS, MIXTURES  # noqa: E402
from support.towers import REFUSED, TOWERS  # noqa: E402

import nnprune.check  # noqa: E402
from nnprune.evaluation import Evaluation  # noqa: E402
from nnprune.model.left_alone import NO_LINEAR  # noqa: E402
from nnprune.model.loading import ModelSource, quieten_transformers  # noqa: E402
from nnprune.records import RunRecord  # noqa: E402
from nnprune.run import run  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- models -->", "<!-- /models -->"
TEXT = "\n".join(f"Line {i} tells of {i * i} things and of nothing else." for i in range(120))
SEQ_LEN, WINDOWS = 32, 4

EXAMPLES = {
    "opt": "OPT",
    "opt_post_norm_projected": "OPT-350M",
    "llama": "Llama 2, 3; SmolLM2",
    "mistral": "Mistral 7B",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "Gemma3ForCausalLM": "Gemma 3 1B",
    "phi3": "Phi-3, Phi-4",
    "falcon_alibi": "Falcon RW",
    "mixtral": "Mixtral 8x7B",
    "qwen3_moe": "Qwen3-30B-A3B",
    "gpt_oss": "gpt-oss-20b",
    "deepseek_v2": "DeepSeek-V2-Lite",
    "deepseek_v3": "DeepSeek-V3, R1",
    "granitemoe": "Granite 3 MoE",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B",
    "glm4_moe": "GLM-4.5, 4.6",
    "llama4": "Llama 4 Scout",
    "qwen3_next": "Qwen3-Next without experts",
    "qwen3_next_moe": "Qwen3-Next-80B-A3B",
    "qwen3_5": "Qwen3.5",
    "bailing_hybrid": "Ling 3 without experts",
    "falcon_h1": "Falcon-H1",
    "granitemoehybrid": "Granite 4.0 Micro",
    "jamba": "Jamba without experts",
    "nemotron_h": "Nemotron-H 8B",
    "lfm2": "LFM2 1.2B",
    "recurrent_gemma": "RecurrentGemma 2B",
    "gemma4_text": "Gemma 4 with embeddings for each layer",
    "gemma4_shared_kv": "Gemma 4 whose last layers reuse keys and values",
    "gemma3n_text": "Gemma 3n",
    "llava": "LLaVA 1.5",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "Gemma3ForConditionalGeneration": "Gemma 3 4B to 27B",
    "gemma4": "Gemma 4",
    "mistral3": "Mistral Small 3.1",
    "idefics3": "Idefics3 8B",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL3",
    "lfm2_vl": "LFM2-VL",
    "paligemma": "PaliGemma 1, 2",
    "mllama": "Llama 3.2 Vision",
    "rwkv": "RWKV-4",
}
"""Of a family, as the tests call it, or of a model class: where model_type does not say it."""

GROUPS = {
    "Dense decoders": FAMILIES,
    "Mixtures of experts": MIXTURES,
    "Hybrids: linear attention, state spaces, short convolutions": HYBRIDS,
    "Text decoders of models that see images": TOWERS,
    "Models that cannot be pruned layer by layer": {name: make for name, (make, _) in REFUSED.items()},
}


def prune(folder: Path, outputs: Path, *runtime: str) -> RunRecord:
    """Prune the model in `folder` with all else at its default."""
    text = folder.parent / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    settings = {
        "model.path": folder,
        "calibration.path": text,
        "calibration.num_samples": 6,
        "calibration.seq_len": SEQ_LEN,
        "evaluation.path": text,
        "evaluation.seq_len": SEQ_LEN,
        "evaluation.max_windows": WINDOWS,
        "runtime.device": "cpu",
        "outputs": outputs,
    }
    chosen = ("model=local", "calibration=text", "evaluation=text", "pruner=wanda", "sparsity=2:4", "save=true")
    return run(compose_config(*chosen, *(f"{key}={value}" for key, value in settings.items()), *runtime))


@torch.no_grad()
def perplexity(model: PreTrainedModel, text: Path) -> float:
    """The perplexity of a plain model, by its own forward."""
    evaluator = Evaluation({}, SEQ_LEN, WINDOWS, str(text)).evaluators["text"]
    ids = evaluator.prepare(byte_tokenizer())
    logits = (
        (row, slice(0, SEQ_LEN), model(input_ids=ids[row : row + 1], use_cache=False).logits[0]) for row in range(len(ids))
    )
    return evaluator.measure(ids, logits)["text_perplexity"]


def check(folder: Path, outputs: Path, record: RunRecord) -> None:
    """Raise AssertionError if the saved model is not the dense one of `folder` with the pruned weights of the record."""
    [saved_folder] = outputs.glob("**/model")
    said = io.StringIO()
    with redirect_stdout(said):  # exact patterns, and all else bit for bit
        status = nnprune.check.main([str(saved_folder), "--base", str(folder)])
    assert status == 0, said.getvalue()
    dense, source = ModelSource(str(folder)), ModelSource(str(saved_folder))
    dense_model, config = dense.load(dense.config()), source.config()
    saved, info = type(dense_model).from_pretrained(saved_folder, config=config, output_loading_info=True)
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    assert not wrong, wrong
    text = folder.parent / "text.txt"
    for model, metrics in ((dense_model, record.dense_metrics), (saved.eval(), record.metrics)):
        plain, measured = perplexity(model, text), metrics["text_perplexity"]
        assert abs(measured / plain - 1) < 1e-3, f"perplexity {measured}, of the plain model {plain}"


def own_names(names: Iterable[str]) -> str:
    """Names within a layer, those of one module together: `self_attn`: q_proj, k_proj."""
    modules: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = name.removesuffix(".weight").split(".")
        place = next(index for index, part in enumerate(parts) if part.isdigit() or part == "*")
        own = ["*" if part.isdigit() else part for part in parts[place + 1 :]]
        module, leaf = ".".join(own[:-1]), own[-1]
        if leaf not in modules[module]:
            modules[module].append(leaf)
    return "; ".join(f"`{module}`: {', '.join(leaves)}" if module else ", ".join(leaves) for module, leaves in modules.items())


def left_alone(record: RunRecord) -> str:
    """What a record names as left alone, with the reasons that are not plain."""
    named = []
    for reason in sorted(set(record.left_alone.values()), key=lambda one: one != NO_LINEAR):
        names = own_names(name for name, why in record.left_alone.items() if why == reason)
        named.append(names if reason == NO_LINEAR else f"{names} ({reason})")
    return "; ".join(named)


def row(name: str, make: Callable[[], PreTrainedModel]) -> str:
    """The row of a family, which says what was pruned, or why nothing was."""
    with tempfile.TemporaryDirectory() as scratch:
        model, folder = make(), Path(scratch) / "base"
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        for runtime in ((), ("runtime=low_memory",)):
            outputs = Path(scratch) / f"outputs{len(runtime)}"
            try:
                record = prune(folder, outputs, *runtime)
            except ValueError as error:
                pruned, others = "--", f"refused: {str(error).splitlines()[0].replace(str(folder), 'DIR').replace('|', '/')}"
                break
            check(folder, outputs, record)
            pruned, others = own_names(linear["name"] for linear in record.per_linear), left_alone(record) or "--"
    examples = EXAMPLES.get(name) or EXAMPLES.get(type(model).__name__, "")
    return f"| `{model.config.model_type}` | {examples} | {pruned} | {others} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families, as the tests call them; none: all, into docs/models.md")
    names = parser.parse_args().names
    quieten_transformers()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    lines = []
    for title, families in GROUPS.items():
        rows = []
        for name, make in families.items():
            if not names or name in names:
                rows.append(row(name, make))
                print(name, rows[-1], flush=True)
        lines += [
            "",
            f"### {title}",
            "",
            "| model_type | such as | pruned | left alone |",
            "| :--- | :--- | :--- | :--- |",
            *rows,
        ]
    if not names:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join([*lines, "", END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
