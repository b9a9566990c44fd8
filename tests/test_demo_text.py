"""The generator behind the embedded demo, and that the shipped texts are what it makes."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import demo_text  # noqa: E402

SHIPPED = ROOT / "nnprune" / "data" / "demo"


@pytest.fixture(scope="module")
def sample() -> str:
    return demo_text.corpus(seed=11, num_bytes=1_500_000)


def test_same_seed_same_text() -> None:
    assert demo_text.document(5, 17) == demo_text.document(5, 17)
    assert demo_text.corpus(5, 20_000) == demo_text.corpus(5, 20_000)


def test_a_longer_corpus_begins_with_the_shorter_one() -> None:
    short = demo_text.corpus(5, 20_000).rstrip("\n")
    assert demo_text.corpus(5, 40_000).startswith(short)


def test_streams_share_no_document() -> None:
    assert len(set(demo_text.SEEDS.values())) == len(demo_text.SEEDS) == 3
    texts = [demo_text.document(seed, index) for seed in demo_text.SEEDS.values() for index in range(300)]
    assert len(set(texts)) == len(texts)


def test_slots_are_filled_and_spacing_is_clean(sample: str) -> None:
    assert not re.search(r"[{}\[\]|*<>_]", sample)
    assert "  " not in sample
    assert "\n\n\n" not in sample
    assert " \n" not in sample
    assert "None" not in sample
    assert not re.search(r" [,.;:!?]", sample)


def test_articles_fit_the_next_word(sample: str) -> None:
    assert not re.search(r"\b[Aa] (?!uni|use|one\b|eu)[aeiou]", sample)
    assert not re.search(r"\b[Aa]n (?!hour|honest|honor|heir)[bcdfghjklmnpqrstvwxyz]", sample)
    assert not re.search(r"\b([Aa]n?|[Tt]he) (an?|the)\b", sample)
    assert not re.search(r"\b(the|a|an|of|to|with) \1\b", sample)


def test_sentences_begin_with_a_capital(sample: str) -> None:
    assert not re.search(r"[.!?] [a-z]", sample)
    assert not re.search(r"(^|\n)[a-z]", sample)


def test_quotes_are_balanced_on_every_line(sample: str) -> None:
    assert [line for line in sample.splitlines() if line.count('"') % 2] == []


def test_there_is_as_much_variety_as_claimed(sample: str) -> None:
    assert len(set(demo_text.patterns())) >= 600
    words = set(re.findall(r"[A-Za-z]+", sample))
    assert len(words) >= 6000
    assert len({word for word in words if word.islower()}) >= 3800


def test_documents_have_a_few_sentences_and_recurring_names() -> None:
    texts = [demo_text.document(3, index) for index in range(400)]
    sentences = [len(re.findall(r'[.!?]"?(?=\s|$)', text)) for text in texts]
    assert min(sentences) >= 3
    assert 8 <= sum(sentences) / len(texts) <= 16
    names = [re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text) for text in texts]
    assert sum(len(found) > len(set(found)) for found in names) > 250


def test_sums_are_right(sample: str) -> None:
    products = re.findall(r"(\d+) times (\d+) is (\d+)", sample)
    assert products
    assert all(int(a) * int(b) == int(c) for a, b, c in products)
    totals = re.findall(r"(\d+) and (\d+) make (\d+)", sample)
    assert totals
    assert all(int(a) + int(b) == int(c) for a, b, c in totals)


@pytest.mark.parametrize(
    ("phrase", "form", "expected"),
    [
        ("knead the dough", "ed", "kneaded the dough"),
        ("stop the leak", "ing", "stopping the leak"),
        ("call the dog and drive it home", "ed", "called the dog and drove it home"),
        ("tie the rope", "ing", "tying the rope"),
        ("write up the log", "en", "written up the log"),
        ("dry the wood", "ed", "dried the wood"),
        ("wash the dishes", "es", "washes the dishes"),
        ("cut the lining", "ing", "cutting the lining"),
    ],
)
def test_verbs_are_inflected(phrase: str, form: str, expected: str) -> None:
    assert demo_text.Lexicon().verb_phrase(phrase, form) == expected


@pytest.mark.parametrize("split", ["calibration", "test"])
def test_shipped_text_is_what_the_generator_makes(split: str) -> None:
    shipped = (SHIPPED / f"{split}.txt").read_text(encoding="utf-8")
    assert 300_000 <= len(shipped.encode()) <= 450_000
    assert shipped == demo_text.corpus(demo_text.SEEDS[split], 400_000)
