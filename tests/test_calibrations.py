"""Calibration by token ids, by conversations and by the model's own text, and evaluation on token ids."""

import json
import random

import pytest
import torch
from conftest import byte_tokenizer, compose_config
from hydra.utils import instantiate
from support.families import FAMILIES
from support.runs import BRIEF, refuse
from support.texts import write_jsonl, write_parquet
from transformers import AutoModelForCausalLM

import nnprune.experiment.job
from nnprune.calibrations.self_written import SelfCalibration
from nnprune.evaluation import Evaluation
from nnprune.experiment.build import build
from nnprune.model.loading import ModelSource
from nnprune.run import run, show_estimate

TEMPLATE = "{% for one in messages %}<s>{{ one.role }}: {{ one.content }}</s>\n{% endfor %}"


def calibration(*overrides):
    size = ("calibration.num_samples=4", "calibration.seq_len=12")
    return instantiate(compose_config("model=local", "model.path=unused", *size, *overrides).calibration, _convert_="all")


@pytest.fixture
def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def conversations(count):
    return [[{"role": "user", "content": f"is {i}?"}, {"role": "assistant", "content": "yes " * (i + 4)}] for i in range(count)]


def text_of(conversation):
    return "".join(f"<s>{one['role']}: {one['content']}</s>\n" for one in conversation)


WRITERS = {
    "a.jsonl": lambda path, found: write_jsonl(path, [{"messages": one, "id": 3} for one in found]),
    "a.jsonl.gz": lambda path, found: write_jsonl(path, found),  # plain lists
    "a.json": lambda path, found: path.write_text(json.dumps(found)),
    "a.parquet": lambda path, found: write_parquet(path, messages=found),
}


@pytest.mark.parametrize("name", WRITERS)
def test_conversations_are_written_by_the_chat_template(name, tmp_path, chat_tokenizer):
    WRITERS[name](tmp_path / name, found := conversations(6))
    settings = ("calibration=chat", f"calibration.path={tmp_path / name}")
    ids = chat_tokenizer("".join(map(text_of, found)), add_special_tokens=False).input_ids
    assert ids[0] == 1  # the template's <s> is one token, and no other is added
    rng = random.Random(0)
    starts = [rng.randint(0, len(ids) - 13) for _ in range(4)]
    drawn = calibration(*settings).token_ids(chat_tokenizer, 264)
    assert drawn.tolist() == [ids[start : start + 12] for start in starts]
    each = calibration(*settings, "calibration.mode=documents").token_ids(chat_tokenizer, 264)
    texts = list(map(text_of, found))
    assert all(any(chat_tokenizer.decode(row) in text for text in texts) for row in each)


BAD_CHATS = [
    ([{"messages": [{"role": "user"}]}], "entry 1 is no conversation; write"),
    ([{"text": "a"}], "entry 1 is no conversation; write"),
    ([[]], "entry 1 is no conversation; write"),
    ([[{"role": "user", "content": "a"}], "b"], "entry 2 is no conversation; write"),
]


@pytest.mark.parametrize(("entries", "problem"), BAD_CHATS, ids=lambda row: str(row))
def test_what_is_no_conversation(entries, problem, tmp_path, chat_tokenizer):
    write_jsonl(tmp_path / "a.jsonl", entries)
    with pytest.raises(ValueError, match=rf"^calibration\.path={tmp_path / 'a.jsonl'}: ") as caught:
        calibration("calibration=chat", f"calibration.path={tmp_path / 'a.jsonl'}").token_ids(chat_tokenizer, 264)
    assert problem in str(caught.value)


def test_a_template_that_refuses_is_told_in_one_line(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('only assistants\nhere') }}"
    write_jsonl(tmp_path / "a.jsonl", conversations(3))
    with pytest.raises(
        ValueError, match=r"^calibration\.path: the model's chat template refuses \[.*only assistants here"
    ) as caught:
        calibration("calibration=chat", f"calibration.path={tmp_path / 'a.jsonl'}").token_ids(chat_tokenizer, 264)
    assert "\n" not in str(caught.value)


def test_a_template_that_writes_the_date_gives_the_same_text_on_any_day(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    write_jsonl(tmp_path / "a.jsonl", [[{"role": "user", "content": "hi"}]])
    found = calibration("calibration=chat", f"calibration.path={tmp_path / 'a.jsonl'}", "calibration.seq_len=11")
    ids = found.token_ids(chat_tokenizer, 264)
    assert all("26 Jul 2024 hi".find(chat_tokenizer.decode(row)) >= 0 for row in ids)


def test_the_template_is_part_of_a_run_and_its_lack_is_told_first(
    tiny_config, tmp_path, chat_tokenizer, tiny_model_dir, monkeypatch
):
    write_jsonl(tmp_path / "a.jsonl", conversations(30))
    settings = ("calibration=chat", f"calibration.path={tmp_path / 'a.jsonl'}", *BRIEF)
    found = []
    with monkeypatch.context() as patch:
        for template in (TEMPLATE, TEMPLATE, TEMPLATE.replace("<s>", "")):
            chat_tokenizer.chat_template = template
            patch.setattr(ModelSource, "tokenizer", lambda self: chat_tokenizer)
            found.append(build(tiny_config(*settings)).fingerprint)
        assert found[0] == found[1] != found[2]
        assert run(tiny_config(*settings)).calibration_hash
    monkeypatch.setattr(ModelSource, "checkpoint", refuse)
    with pytest.raises(ValueError, match=r"^calibration=chat: the model's tokenizer has no chat template; choose a chat model"):
        run(tiny_config(*settings))


def test_token_ids_of_files(tmp_path):
    rows = [[10 * row + place % 10 for place in range(12)] for row in range(4)]
    write_jsonl(tmp_path / "a.jsonl", [{"input_ids": row} for row in rows])
    settings = ("calibration=tokens", f"calibration.path={tmp_path / 'a.jsonl'}")
    assert calibration(*settings).token_ids(None, 264).tolist() == rows  # as many as samples: as they are
    write_parquet(tmp_path / "b.parquet", tokens=[*rows, [1, 2], list(range(100, 200))])
    longer = ("calibration=tokens", f"calibration.path={tmp_path / 'b.parquet'}", "calibration.column=tokens")
    drawn = calibration(*longer, "calibration.num_samples=5").token_ids(None, 264).tolist()
    assert drawn[:4] == rows
    assert drawn[4] == list(range(drawn[4][0], drawn[4][0] + 12))
    assert calibration(*longer, "seed=1").token_ids(None, 264).tolist() != calibration(*longer).token_ids(None, 264).tolist()
    for settings, problem in (
        (
            (*longer, "calibration.num_samples=6"),
            r"^calibration\.num_samples=6: of 6 rows, 5 have calibration\.seq_len=12 tokens",
        ),
        ((*longer, "calibration.column=text"), r"^calibration\.column=text: is no column of token ids; .* has tokens"),
    ):
        with pytest.raises(ValueError, match=problem):
            calibration(*settings).token_ids(None, 264)
    with pytest.raises(
        ValueError, match=r"^calibration\.column=tokens: has the token id \d+, the model's go from 0 to 9; tokenise"
    ):
        calibration(*longer).token_ids(None, 10)


def test_evaluation_on_token_ids(tiny_config, tmp_path):
    rows = torch.randint(264, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
    write_jsonl(tmp_path / "a.jsonl", [{"input_ids": row} for row in rows])
    evaluation = Evaluation({}, 32, path=str(tmp_path / "a.jsonl"), column="input_ids")
    assert evaluation.token_ids(None)["text"].tolist() == rows
    settings = ("sparsity=dense", f"evaluation.path={tmp_path / 'a.jsonl'}", "evaluation.column=input_ids")
    assert run(tiny_config(*settings)).metrics["text_perplexity"] > 1
    write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [264] * 32}])
    with pytest.raises(ValueError, match=r"^evaluation: text: has the token id 264, the model's go from 0 to 263"):
        run(tiny_config(*settings))


@pytest.fixture
def self_config(tiny_config):
    """The config of a run with text that the model writes."""

    def make(*settings, **calibration):
        cfg = tiny_config(*settings)
        cfg.calibration = compose_config("model=local", "model.path=unused", "calibration=self").calibration
        cfg.calibration.update(calibration)
        return cfg

    return make


def test_the_model_writes_its_calibration(self_config, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen, original = [], nnprune.experiment.job.written_ids
    monkeypatch.setattr(nnprune.experiment.job, "written_ids", lambda *a: seen.append(original(*a)) or seen[-1])
    cfg = self_config(*BRIEF, num_samples=5, seq_len=24, batch_size=2)
    record = run(cfg)
    [ids] = seen
    assert ids.shape == (5, 24)
    assert (ids[:, 0] == 1).all()  # <s>
    assert len({tuple(row) for row in ids.tolist()}) == 5
    assert record.seconds["generation"] > 0
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    again = SelfCalibration(5, 24, 0, batch_size=2)
    assert torch.equal(again.write(model, again.token_ids(byte_tokenizer(), 264)), ids)
    other = SelfCalibration(5, 24, 1, batch_size=2)
    assert not torch.equal(other.write(model, other.token_ids(byte_tokenizer(), 264)), ids)
    cfg.pruner._target_ = "nnprune.pruners.wanda.Wanda"
    monkeypatch.setattr(ModelSource, "load", refuse)  # another method sees what is in the cache
    assert run(cfg).calibration_hash == record.calibration_hash


@torch.no_grad()
def test_the_text_of_a_model_is_its_distribution():
    """At a low temperature every sample is the greedy one; at 1 the frequencies of the second token are its probabilities."""
    model = FAMILIES["llama"]().eval()
    first = torch.full((400, 2), 5)
    greedy = SelfCalibration(400, 2, 0, temperature=1e-4, batch_size=400).write(model, first)
    probabilities = model(first[:1, :1]).logits[0, 0].softmax(-1)
    assert (greedy[:, 1] == probabilities.argmax()).all()
    drawn = SelfCalibration(400, 2, 0, batch_size=400).write(model, first)
    counts = torch.bincount(drawn[:, 1], minlength=len(probabilities))
    assert (counts > 0).sum() > 50  # more than the 50 likeliest that transformers would leave
    assert float((counts / 400 - probabilities).abs().max()) < 0.06


def test_what_the_own_text_of_a_model_needs(self_config, tmp_path, monkeypatch):
    ids = SelfCalibration(50, 2, 0, first_token="random").token_ids(byte_tokenizer(), 264)
    assert len(ids[:, 0].unique()) > 30
    assert ids.max() < 259
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert len(SelfCalibration(50, 2, 0).token_ids(tokenizer, 264)[:, 0].unique()) > 30
    with pytest.raises(ValueError, match=r"^calibration\.first_token=bos: the model's tokenizer has no beginning"):
        SelfCalibration(1, 2, 0, first_token="bos").token_ids(tokenizer, 264)
    with pytest.raises(ValueError, match=r"^calibration\.first_token=eos: must be bos, random or null"):
        SelfCalibration(1, 2, 0, first_token="eos")
    monkeypatch.setattr(ModelSource, "load", refuse)
    with pytest.raises(ValueError, match=r"^calibration=self: the whole model must be in memory .* runtime\.layers=disk"):
        run(self_config("runtime=low_memory"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = self_config(num_samples=3, seq_len=32)
    show_estimate([small])
    monkeypatch.setattr("nnprune.experiment.written_text.available_host_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=r"^calibration=self: the whole model must be in memory .* there are 0\.0"):
        run(small)


def test_a_model_that_runs_out_of_device_memory_while_it_writes(tiny_model_dir, monkeypatch):
    def generate(*_, **__):
        raise torch.OutOfMemoryError

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    monkeypatch.setattr(model, "generate", generate)
    own = SelfCalibration(2, 8, 0, batch_size=2)
    with pytest.raises(ValueError, match=r"^calibration\.batch_size=2: the device ran out of memory .* lower it$"):
        own.write(model, own.token_ids(byte_tokenizer(), 264))
