"""Tasks of lm-eval, offline: their figures are those of lm-eval's own model class on the same saved model."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, compose_config
from omegaconf import OmegaConf
from support.ranks import on_ranks
from support.runs import failure, watch_measurements

pytest.importorskip("lm_eval")

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from nnprune.engine.pruning_pass import PruningPass
from nnprune.evaluation import lm_eval_tasks
from nnprune.evaluation.lm_eval import LMEval
from nnprune.evaluation.lm_eval_rows import RequestRows, padded_length
from nnprune.evaluation.lm_eval_tasks import LMEvalTask
from nnprune.experiment.build import build
from nnprune.experiment.cost_estimate import CostEstimate
from nnprune.records import read_all
from nnprune.run import run

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}, cache_dir: {cache}}}
test_split: test
metadata: {{version: 3.0}}
"""
TASKS = {
    "colours": """
task: colours
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{text}} is"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "lines": """
task: lines
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "letters": """
task: letters
output_type: multiple_choice
doc_to_text: "{{text}} is"
doc_to_target: answer
doc_to_choice: [a, b, c]
metric_list: [{metric: acc}]
""",
    "stories": """
task: stories
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 2}
metric_list: [{metric: exact_match}]
""",
}
WORDS = ("stone", "river", "lamp", "cloud", "bread", "wheel")


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """A folder of tasks with a few documents, one of them longer than the tiny model's 64 positions."""
    folder, cache = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("datasets")
    documents = [
        {
            "text": " ".join(WORDS[(i * j) % 6] for j in range(1, 2 + (i % 4) ** 2)),
            "choices": [" red", " dark blue", " of no colour"],
            "answer": i % 3,
        }
        for i in range(18)
    ]
    data = folder / "colours.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text + COMMON.format(data=data, cache=cache), encoding="utf-8")
    return folder


@pytest.fixture
def task_config(tiny_model_dir, small_text, tasks_dir, tmp_path):
    """`task_config("colours", {"save": True}, limit=2)`: the config of a run with a task, or tasks, and settings of `evaluation`."""

    def make(tasks, others=None, **evaluation):
        calibration = [f"calibration.{one}" for one in (f"path={small_text}", "num_samples=4", "seq_len=32")]
        groups = ("model=local", "calibration=text", "evaluation=lm_eval", "sparsity=2:4")
        cfg = compose_config(*groups, f"model.path={tiny_model_dir}", *calibration, "runtime.device=cpu")
        evaluation = {"include_path": str(tasks_dir), "tasks": tasks.split(",")} | evaluation
        settings = {f"evaluation.{key}": value for key, value in evaluation.items()}
        for key, value in ({"outputs": str(tmp_path / "outputs")} | settings | (others or {})).items():
            OmegaConf.update(cfg, key, value)
        return cfg

    return make


def of_lm_eval(path, tasks_dir, tasks, num_fewshot):
    """The figures that lm-eval's own model class gets of the model in a folder."""
    figures, model = {}, HFLM(str(path), device="cpu", batch_size=5)
    for name in tasks:
        loaded = LMEvalTask(name, num_fewshot, include_path=(str(tasks_dir),)).load()
        results = evaluate(model, loaded, log_samples=False)["results"][name]
        pairs = ((key.removesuffix(",none"), value) for key, value in results.items() if key.endswith(",none"))
        figures |= {f"{name}_{metric}": value for metric, value in pairs if value != "N/A"}
    return figures


def test_figures_are_lm_evals_own(task_config, tasks_dir, tiny_model_dir):
    tasks = ("colours", "lines", "letters")
    cfg = task_config(",".join(tasks), {"save": True, "runtime.batch_tokens": 99}, num_fewshot=1)
    record, folder = run(cfg), build(cfg).folder
    expected = of_lm_eval(folder / "model", tasks_dir, tasks, num_fewshot=1)
    expected_dense = of_lm_eval(tiny_model_dir, tasks_dir, tasks, num_fewshot=1)
    assert record.metrics == pytest.approx(expected, rel=1e-6)
    assert record.dense_metrics == pytest.approx(expected_dense, rel=1e-6)
    assert record.metrics != record.dense_metrics
    assert {"colours_acc", "colours_acc_norm_stderr", "lines_word_perplexity"} <= record.metrics.keys()
    [entry] = (entry for entry in record.evaluations.values() if entry["name"] == "colours")
    assert entry["settings"]["versions"] == {"colours": 3.0} and entry["settings"]["lm-eval"]


def test_a_task_added_to_a_saved_model_is_all_that_is_measured(task_config, monkeypatch):
    cfg = task_config("colours", {"save": True}, limit=4)
    first = run(cfg)
    monkeypatch.setattr(PruningPass, "_prune", lambda *_: pytest.fail("it is pruned again"))
    titles = watch_measurements(monkeypatch)
    record = run(task_config("colours,letters", limit=4))
    key = build(task_config("letters", limit=4)).evaluations["letters"]
    assert titles == [f"dense {key}", f"dense {key}"]  # of the saved model, which is taken as it is, and of the dense one
    assert record.metrics.items() >= first.metrics.items() and "letters_acc" in record.metrics


def test_two_processes_share_out_the_rows(task_config, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    expected = run(task_config("colours,lines", {"outputs": str(one)}, limit=8))
    assert on_ranks(run, task_config("colours,lines", {"outputs": str(two)}, limit=8)) == [0, 0]
    records, _ = read_all(two)
    [record] = (record for record in records if record["pruner"] != "dense")
    assert record["metrics"] == pytest.approx(expected.metrics, rel=1e-5)


def test_tasks_that_generate_text_take_the_whole_saved_model(task_config, tmp_path):
    assert "stories: generates text, which takes a whole saved model" in failure(task_config("stories"))
    outputs = {"outputs": str(tmp_path / "hf")}
    assert "set save=true" in failure(task_config("stories", outputs, backend="hf"))
    record = run(task_config("stories", outputs | {"save": True}, backend="hf", limit=2))
    assert record.metrics["stories_exact_match"] == record.dense_metrics["stories_exact_match"] == 0
    assert record.status == "completed" and read_all(tmp_path / "hf")[1] == []


def test_a_task_that_is_measured_is_kept_whatever_becomes_of_the_next(task_config, monkeypatch):
    measure, calls = LMEval.measure_model, []

    def fail_at_the_third(self, *args, **more):  # the first two are of the saved and of the dense model with one task
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return measure(self, *args, **more)

    monkeypatch.setattr(LMEval, "measure_model", fail_at_the_third)
    cfg = task_config("stories,colours", {"save": True}, backend="hf", limit=2)
    with pytest.raises(MemoryError):
        run(cfg)
    assert run(cfg).metrics.keys() >= {"stories_exact_match", "colours_acc"}
    assert len(calls) == 5, "the first task is not measured again"


def test_plan_counts_the_tokens_of_requests(task_config):
    experiment = build(task_config("colours"))
    estimate = CostEstimate([experiment])
    rows = experiment.evaluation.evaluators["colours"].prepare(experiment.source.tokenizer())
    assert estimate.load.windows == 2 * sum(map(torch.numel, rows)) > 0
    assert estimate.seconds["evaluation"] > 0


def test_what_changes_a_figure_changes_its_fingerprint(task_config, tasks_dir):
    key = "colours"
    settings = ({}, {"num_fewshot": 1}, {"limit": 2}, {"seed": 3}, {"max_length": 40}, {"backend": "hf"})
    keys = [build(task_config(key, **one)).evaluations[key] for one in settings]
    data, code = tasks_dir / "colours.jsonl", tasks_dir / "utils.py"
    text = data.read_text()
    data.write_text(text.replace("stone", "rock"))
    keys.append(build(task_config(key)).evaluations[key])
    data.write_text(text)
    code.write_text("# a task's own code")
    keys.append(build(task_config(key)).evaluations[key])
    code.unlink()
    (tasks_dir / "notes.txt").write_text("not a task")
    assert len(set(keys)) == len(keys)
    assert build(task_config(key)).evaluations[key] == keys[0]
    assert build(task_config(f"lines,{key}")).evaluations[key] == keys[0], "other tasks do not matter"


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        ("colurs", {}, "evaluation.tasks=colurs: no such task; did you mean colours?"),
        ("colours,colours", {}, "the task twice"),
        ("colours", {"include_path": "nowhere"}, "evaluation.include_path=nowhere: no such folder"),
        ("colours", {"limit": 0}, "evaluation.limit=0: must be a whole number"),
        ("colours", {"backend": "vllm"}, "must be layerwise or hf"),
        ("colours", {"max_length": 65}, "evaluation.max_length=65: tiny-opt has 64 positions"),
    ],
)
def test_mistakes_are_one_line(tasks, settings, message, task_config, monkeypatch):
    index = lm_eval_tasks._manager
    monkeypatch.setattr(
        lm_eval_tasks, "_manager", lambda paths, digest, _: index(paths, digest, False)
    )  # the whole takes seconds
    assert message in failure(task_config(tasks, **settings))


def test_without_lm_eval_a_line_says_what_to_install(task_config, monkeypatch):
    lm_eval_tasks._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.manager", None)
    assert "pip install 'nnprune[eval]'" in failure(task_config("colours"))


def test_requests_share_rows_of_few_lengths():
    lengths = [padded_length(length) for length in range(1, 2049)]
    assert len(set(lengths)) < 40 and all(length <= padded < 1.25 * length + 4 for length, padded in enumerate(lengths, 1))
    rows = RequestRows(byte_tokenizer(), 50)
    rows.loglikelihood([SimpleNamespace(args=("is it", answer)) for answer in ("a", "b", "bc")])
    rows.loglikelihood([SimpleNamespace(args=("of a" * 20, " long one"))])
    assert [tuple(ids.shape) for ids in rows.ids()] == [(2, 8), (1, 50)]


def test_a_continuation_may_lie_in_several_slices_of_logits():
    rows = RequestRows(byte_tokenizer(), 50)
    requests = [SimpleNamespace(args=("so", "mewhere"))]
    rows.loglikelihood(requests)
    [ids] = rows.ids()
    scores = torch.randn(8, 259, generator=torch.Generator().manual_seed(0))
    tokens = byte_tokenizer()("mewhere").input_ids
    scores[range(1, 8), tokens] += 9  # the context is two tokens, and the last one of a request is no input
    rows.answers = rows.score(ids, [(0, part, scores[part]) for part in (slice(0, 3), slice(3, 6), slice(6, 8))])
    expected = scores[1:8].log_softmax(-1)[range(7), tokens].sum()
    assert rows.loglikelihood(requests) == [(pytest.approx(float(expected), rel=1e-5), True)]
