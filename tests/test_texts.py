"""Texts and token ids: files in the hub's own layout, through the shipped YAMLs, against the official loaders' draws."""

import random

import pytest
import torch
from conftest import byte_tokenizer, compose_config
from hydra.utils import instantiate
from support.texts import write_jsonl, write_parquet
from tokenizers.processors import TemplateProcessing

from nnprune.calibration import RandomCalibration, TextCalibration, token_hash
from nnprune.texts import TextSource

WORDS = ["the", "a", "river", "bridge", "under", "walked", "slowly", "Anna", "1984", ",", "."]


@pytest.fixture(scope="module")
def tokenizer():
    """A token a byte, and one at the beginning as for OPT, so that tokenising in pieces would show."""
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def sentences(count: int, longest: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


@pytest.fixture
def c4(tmp_path):
    """A folder as allenai/c4 on the hub, with its columns, and its texts by split."""
    texts = {"train": sentences(60, 30, seed=1), "validation": sentences(1200, 4, seed=2)}
    for split, count in (("train", 1024), ("validation", 8)):
        rows = [{"text": text, "url": "http://x.y", "timestamp": "2019-04-25T12:57:54Z"} for text in texts[split]]
        write_jsonl(tmp_path / f"c4/en/c4-{split}.00000-of-{count:05d}.json.gz", rows)
    return tmp_path / "c4", texts


@pytest.fixture
def wikitext(tmp_path):
    """A folder as Salesforce/wikitext on the hub, and its texts by split: headings, paragraphs and empty rows."""
    texts = {}
    for split, seed in (("train", 3), ("test", 4)):
        texts[split] = ["", " = Title = \n", "", *(f" {text} \n" for text in sentences(40, 20, seed)), ""]
        write_parquet(tmp_path / f"wikitext/wikitext-2-raw-v1/{split}-00000-of-00001.parquet", text=texts[split])
    return tmp_path / "wikitext", texts


@pytest.fixture
def ptb(tmp_path):
    texts = sentences(50, 12, seed=5)
    write_parquet(tmp_path / "ptb/penn_treebank/test/0000.parquet", sentence=texts)
    return tmp_path / "ptb", texts


def from_command_line(group: str, overrides: str):
    cfg = compose_config("model=local", "model.path=unused", *overrides.split())
    return instantiate(cfg[group], _convert_="all")


def official_c4(texts, tokenizer, num_samples, seq_len, seed):
    """get_c4 of SparseGPT and Wanda."""
    random.seed(seed)
    rows = []
    for _ in range(num_samples):
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = tokenizer(texts[i], return_tensors="pt").input_ids
            if ids.shape[1] > seq_len:
                break
        i = random.randint(0, ids.shape[1] - seq_len - 1)
        rows.append(ids[:, i : i + seq_len])
    return torch.cat(rows)


def official_wikitext2(texts, tokenizer, num_samples, seq_len, seed):
    """get_wikitext2 of SparseGPT and Wanda."""
    ids = tokenizer(" ".join(texts), return_tensors="pt").input_ids
    random.seed(seed)
    starts = [random.randint(0, ids.shape[1] - seq_len - 1) for _ in range(num_samples)]
    return torch.cat([ids[:, i : i + seq_len] for i in starts])


def official_windows(text, tokenizer, seq_len):
    ids = tokenizer(text, return_tensors="pt").input_ids
    return [ids[0, i * seq_len : (i + 1) * seq_len].tolist() for i in range(ids.numel() // seq_len)]


def test_c4_calibration_draws_as_the_official_loader(c4, tokenizer):
    size = "calibration.num_samples=9 calibration.seq_len=64 seed=7"
    calibration = from_command_line("calibration", f"calibration=c4 calibration.dataset={c4[0]} {size}")
    ids = calibration.token_ids(tokenizer, vocab_size=264)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, official_c4(c4[1]["train"], tokenizer, 9, 64, seed=7))


def test_wikitext2_calibration_draws_as_the_official_loader(wikitext, tokenizer):
    size = "calibration.num_samples=8 calibration.seq_len=50"
    calibration = from_command_line("calibration", f"calibration=wikitext2 calibration.dataset={wikitext[0]} {size}")
    ids = calibration.token_ids(tokenizer, vocab_size=264)
    assert torch.equal(ids, official_wikitext2(wikitext[1]["train"], tokenizer, 8, 50, seed=0))


def test_three_evaluations_at_once_are_the_official_windows(wikitext, c4, ptb, tokenizer):
    folders = {"wikitext2": wikitext[0], "c4": c4[0], "ptb": ptb[0]}
    places = " ".join(f"evaluation.datasets.{name}.dataset={folder}" for name, folder in folders.items())
    evaluation = from_command_line("evaluation", f"evaluation=[wikitext2,c4,ptb] evaluation.seq_len=40 {places}")
    ids = {name: rows.tolist() for name, rows in evaluation.token_ids(tokenizer).items()}
    c4_windows = official_windows(" ".join(c4[1]["validation"][:1100]), tokenizer, 40)
    assert len(c4_windows) > 256  # or the limit would not be seen
    assert ids == {
        "wikitext2": official_windows("\n\n".join(wikitext[1]["test"]), tokenizer, 40),
        "c4": c4_windows[:256],
        "ptb": official_windows(" ".join(ptb[1]), tokenizer, 40),
    }


@pytest.mark.parametrize(("max_windows", "found"), [("null", 256), ("3", 3), ("300", 256)])
def test_the_smaller_limit_of_windows_counts(c4, tokenizer, max_windows, found):
    size = f"evaluation.max_windows={max_windows} evaluation.seq_len=40"
    evaluation = from_command_line("evaluation", f"evaluation=c4 evaluation.datasets.c4.dataset={c4[0]} {size}")
    assert evaluation.token_ids(tokenizer)["c4"].shape == (found, 40)


def test_evaluation_text_beside_a_dataset_and_none(ptb, tmp_path, tokenizer):
    path = tmp_path / "own.txt"
    path.write_text("one two three\n\nfour five six", encoding="utf-8")
    places = f"evaluation.datasets.ptb.dataset={ptb[0]} evaluation.path={path}"
    evaluation = from_command_line("evaluation", f"evaluation=[ptb,text] evaluation.seq_len=9 {places}")
    ids = evaluation.token_ids(tokenizer)
    assert list(ids) == ["ptb", "text"]
    assert ids["text"].tolist() == official_windows("one two three\n\nfour five six", tokenizer, 9)
    assert from_command_line("evaluation", "evaluation=none").token_ids(tokenizer) == {}


def test_several_files_are_read_in_order_and_other_columns_by_name(tmp_path):
    write_parquet(tmp_path / "b.parquet", body=["four"])
    write_jsonl(tmp_path / "c.jsonl", [{"body": "five"}])
    (tmp_path / "a.txt").write_text("six\n\nseven", encoding="utf-8")
    paths = [str(tmp_path / name) for name in ("b.parquet", "c.jsonl", "a.txt")]
    assert TextSource("calibration", path=paths, column="body").joined() == "four\n\nfive\n\nsix\n\nseven"


def test_a_text_file_without_blank_lines_holds_a_document_a_line(tmp_path):
    (tmp_path / "lines.txt").write_text("one\n two \r\nthree", encoding="utf-8")
    assert TextSource("calibration", path=str(tmp_path / "lines.txt")).documents() == ["one", " two ", "three"]


def test_calibration_text_packed_and_by_document(tmp_path, tokenizer):
    texts = sentences(30, 20, seed=6)
    write_jsonl(tmp_path / "own.json.gz", [{"body": text} for text in texts])
    size = "calibration.num_samples=6 calibration.seq_len=40 seed=3"
    common = f"calibration=text calibration.path={tmp_path / 'own.json.gz'} calibration.column=body {size}"
    packed = from_command_line("calibration", common).token_ids(tokenizer, 264)
    assert torch.equal(packed, official_wikitext2(["\n\n".join(texts)], tokenizer, 6, 40, seed=3))
    documents = from_command_line("calibration", f"{common} calibration.mode=documents").token_ids(tokenizer, 264)
    assert torch.equal(documents, official_c4(texts, tokenizer, 6, 40, seed=3))


def test_the_seed_alone_decides_the_ids(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n\n".join(sentences(30, 20, seed=8)), encoding="utf-8")
    for make in (
        lambda seed: TextCalibration(5, 20, seed, path=str(tmp_path / "a.txt")),
        lambda seed: TextCalibration(5, 20, seed, mode="documents", path=str(tmp_path / "a.txt")),
        lambda seed: RandomCalibration(5, 20, seed),
    ):
        ids = make(1).token_ids(tokenizer, 264)
        assert ids.shape == (5, 20)
        assert ids.dtype == torch.int64
        random.seed(99)
        torch.manual_seed(99)
        assert torch.equal(make(1).token_ids(tokenizer, 264), ids)
        assert not torch.equal(make(2).token_ids(tokenizer, 264), ids)


def test_random_ids_lie_in_the_vocabulary(tokenizer):
    ids = RandomCalibration(50, 40, seed=0).token_ids(tokenizer, 7)
    assert sorted(set(ids.flatten().tolist())) == list(range(7))


def test_token_hash_names_shape_and_content():
    ids = torch.arange(12).view(3, 4)
    assert token_hash(ids) == token_hash(ids.to(torch.int32)) == token_hash(ids.t().contiguous().t())
    assert len({token_hash(other) for other in (ids, ids + 1, ids.view(4, 3), ids[:2], ids.flip(0))}) == 5


def test_rows_without_a_text_are_left_out(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["one", None, "two"])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "three"}, {"text": None}])
    paths = [str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")]
    assert list(TextSource("calibration", path=paths).documents()) == ["one", "two", "three"]


def test_a_text_must_be_longer_than_the_window(tmp_path, tokenizer):
    """The official loader draws from n_tokens - seq_len places, so one token more gives one window and none is an error."""
    path = str(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("12345678", encoding="utf-8")
    for mode in ("documents", "packed"):
        calibration = TextCalibration(20, 8, seed=0, mode=mode, path=path)
        assert calibration.token_ids(tokenizer, 264).tolist() == [tokenizer("1234567").input_ids] * 20
    with pytest.raises(ValueError, match=r"^calibration.seq_len=9: no document is longer"):
        TextCalibration(1, 9, seed=0, mode="documents", path=path).token_ids(tokenizer, 264)
    with pytest.raises(ValueError, match=r"^calibration.seq_len=9: the text has 9 tokens"):
        TextCalibration(1, 9, seed=0, mode="packed", path=path).token_ids(tokenizer, 264)
