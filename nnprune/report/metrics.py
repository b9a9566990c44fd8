"""Names of metrics, `<text or task>_<measure>` in records, and whether more is better."""

import re

HIGHER_IS_BETTER = re.compile(
    r"(?i)(?<![a-z0-9])(accuracy|acc(_norm|_bytes|_mutual_info)?|exact_match|em|f1|mcc|precision|recall|pass(@|_at_)\d+|chrf"
    r"|(bleu|rouge([12L]|Lsum)?)(_max|_diff)?)$"
)
LOWER_IS_BETTER = re.compile(
    r"(?i)(?<![a-z0-9])(perplexity|ppl|bits_per_(byte|token)|loss|nll|cross_entropy|kl_divergence|error"
    r"|mse|rmse|mae|brier_score|wer|cer|ter)$"
)
"""How metrics end whose direction is known: nnprune's, those of lm-eval's tasks, and the usual names of others."""

MEASURES = {"perplexity": "perplexity", "acc_norm": "normalised accuracy", "acc": "accuracy", "accuracy": "accuracy"}
TEXTS = {
    **{"wikitext2": "WikiText-2", "c4": "C4", "ptb": "Penn Treebank", "demo": "Demo", "text": "Text", "mean": "Mean"},
    **{"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "piqa": "PIQA", "hellaswag": "HellaSwag"},
    **{"winogrande": "WinoGrande", "boolq": "BoolQ", "rte": "RTE", "openbookqa": "OpenBookQA", "mmlu": "MMLU"},
}


def higher_is_better(metric: str) -> bool | None:
    """The direction of a metric, asked for wherever a best value is marked; None, and none is marked, where it is not known."""
    return True if HIGHER_IS_BETTER.search(metric) else False if LOWER_IS_BETTER.search(metric) else None


def pretty_metric(metric: str) -> str:
    """`WikiText-2 perplexity` for wikitext2_perplexity; an unknown text or task as it is, with spaces for underscores."""
    for suffix, measure in MEASURES.items():
        if metric.endswith(f"_{suffix}"):
            text = metric.removesuffix(f"_{suffix}")
            return f"{TEXTS.get(text, text.replace('_', ' '))} {measure}"
    return metric.replace("_", " ")


def describe(metric: str) -> str:
    """`WikiText-2 perplexity, lower is better`."""
    return pretty_metric(metric) + direction(metric)


def direction(metric: str) -> str:
    """`, lower is better`; nothing where it is not known."""
    return {True: ", higher is better", False: ", lower is better", None: ""}[higher_is_better(metric)]
