"""Names of pruners, sparsities and models, their order, and their escapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnprune.report import labels
from nnprune.report.escaping import UNNAMED, distinct_names, visible


def test_order_of_models_and_patterns():
    models = ["bloom-560m", "opt-13b", "opt-1.3b", "llama-2-7b", "opt-350m", "demo", "opt-125m", "Llama-3-8b"]
    ordered = ["demo", "bloom-560m", "llama-2-7b", "Llama-3-8b", "opt-125m", "opt-350m", "opt-1.3b", "opt-13b"]
    assert sorted(models, key=labels.model_key) == ordered
    sparsities = ["4:8", "2:4", "0.75", "3:4", "0.5", "odd", "0.625"]
    assert sorted(sparsities, key=labels.sparsity_key) == ["0.5", "0.625", "0.75", "3:4", "2:4", "4:8", "odd"]
    assert [labels.pretty_sparsity(s) for s in ("0.55", "0.625", "2:4")] == ["55%", "62.5%", "2:4"]


def test_order_and_names_of_methods():
    ordered = {
        "dense": "Dense",
        "magnitude": "Magnitude",
        "wanda": "Wanda",
        "wanda+refit": "Wanda + refit",
        "wanda_refit": "Wanda + refit",
        "wanda+refit+layer": "Wanda + refit + layer",
        "wanda+asymmetric": "Wanda + asymmetric",
        "ria": "RIA",
        "dsnot": "DSnoT",
        "swaps": "Swaps",
        "sparsegpt": "SparseGPT",
        "sparsegpt_refit": "SparseGPT + refit",
        "admm": "ADMM",
        "alps": "ALPS",
        "best_fast": "best_fast",
        "best_medium": "best_medium",
        "best": "best",
        "best+owl": "best + owl",
        "Alpha": "Alpha",
        "mine": "mine",
        "mine_refit": "mine_refit",
        "sparsegpt_nnpruning": "SparseGPT (nn-pruning)",
    }
    assert sorted(reversed(ordered), key=labels.pruner_key) == list(ordered)
    assert {label: labels.pretty_pruner(label) for label in ordered} == ordered


@pytest.mark.parametrize(
    ("label", "normal", "key"),
    [
        ("0.50", "0.5", (labels.UNSTRUCTURED, 0.5, 0)),
        ("0", "dense", (labels.UNSTRUCTURED, 0.0, 0)),
        (" 2:4 ", "2:4", (labels.N_OF_M, 0.5, 4)),
        ("9999998:9999999", "9999998:9999999", (labels.N_OF_M, 1 - 9999998 / 9999999, 9999999)),
        *((label, label, (labels.UNKNOWN, 0.0, 0)) for label in ("1:1000000000000", "4:2", "4:4", "0:4", "2:0", "2:٤")),
        *((label, label, (labels.UNKNOWN, 0.0, 0)) for label in ("1:" + "9" * 400, "nan", "inf", "1.0", "-0.5")),
    ],
)
def test_sparsities(label, normal, key):
    assert labels.normal_sparsity(label) == normal
    assert labels.sparsity_key(normal) == key


@given(st.sets(st.text(max_size=12)) | st.sets(st.text("sS pP+_refit()2", max_size=8)))
def test_names_are_unique_visible_and_the_same_in_any_order(texts):
    names = distinct_names(texts, labels.pretty_pruner, reserved=["Dense"])
    assert set(names) == texts
    assert len({*names.values(), "Dense"}) == len(texts) + 1
    assert all(name == visible(name) and name for name in names.values())
    assert distinct_names(sorted(texts, reverse=True), labels.pretty_pruner, reserved=["Dense"]) == names


def test_names_of_what_has_none():
    assert distinct_names(["", " ", "a"], str) == {"": UNNAMED, " ": f"{UNNAMED} (2)", "a": "a"}
    assert distinct_names(["\xe9", "e\u0301"], str) == {"e\u0301": "e\u0301", "\xe9": "\xe9 (2)"}
