"""Names of metrics, `<text or task>_<measure>` in records, and whether more is better."""

HIGHER_IS_BETTER = ("accuracy", "acc", "acc_norm", "exact_match", "f1", "mcc", "bleu", "rouge")
MEASURES = {"perplexity": "perplexity", "acc_norm": "normalised accuracy", "acc": "accuracy", "accuracy": "accuracy"}
TEXTS = {
    **{"wikitext2": "WikiText-2", "c4": "C4", "ptb": "Penn Treebank", "demo": "Demo", "text": "Text", "mean": "Mean"},
    **{"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "piqa": "PIQA", "hellaswag": "HellaSwag"},
    **{"winogrande": "WinoGrande", "boolq": "BoolQ", "rte": "RTE", "openbookqa": "OpenBookQA", "mmlu": "MMLU"},
}


def higher_is_better(metric: str) -> bool:
    """The direction of a metric, asked for wherever a best value is marked. What is not known as an accuracy is a loss."""
    return metric.endswith(HIGHER_IS_BETTER)


def pretty_metric(metric: str) -> str:
    """`WikiText-2 perplexity` for wikitext2_perplexity; an unknown text or task as it is, with spaces for underscores."""
    for suffix, measure in MEASURES.items():
        if metric.endswith(f"_{suffix}"):
            text = metric.removesuffix(f"_{suffix}")
            return f"{TEXTS.get(text, text.replace('_', ' '))} {measure}"
    return metric.replace("_", " ")


def describe(metric: str) -> str:
    """`WikiText-2 perplexity, lower is better`."""
    return f"{pretty_metric(metric)}, {'higher' if higher_is_better(metric) else 'lower'} is better"
