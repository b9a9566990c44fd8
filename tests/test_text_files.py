"""Local files of text: which file is read, byte-order marks, and files that cannot be read."""

import gzip

import pytest
from support.texts import write_jsonl, write_parquet

from nnprune.texts import TextSource


@pytest.mark.parametrize("name", ["set[1]", "a*b", "what?", "{x,y}", "a::b", "-x=1"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json.gz", "parquet"])
def test_a_path_is_the_file_of_exactly_that_name(tmp_path, name, kind):
    """Beside files that it would fit as a pattern."""
    write = {"txt": lambda path, text: path.write_text(text), "parquet": lambda path, text: write_parquet(path, text=[text])}
    write = write.get(kind, lambda path, text: write_jsonl(path, [{"text": text}]))
    for other in ("set1", "ab", "axb", "what!", "x"):
        write(tmp_path / f"{other}.{kind}", "another file")
    write(tmp_path / f"{name}.{kind}", "this one")
    source = TextSource("calibration", path=str(tmp_path / f"{name}.{kind}"))
    source.check()
    assert list(source.documents()) == ["this one"]
    assert list(TextSource("calibration", dataset=str(tmp_path), data_files=f"{name}.{kind}").documents()) == ["this one"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    texts = {
        "a.txt": "one\n\ntwo",
        "a.jsonl": '{"text": "one"}\n{"text": "two"}\n',
        "a.json": '[{"text": "one"},\n{"text": "two"}]',
    }
    (tmp_path / name).write_text(texts[name], encoding="utf-8-sig")
    assert list(TextSource("calibration", path=str(tmp_path / name)).documents()) == ["one", "two"]


def test_a_glob_within_a_local_dataset(tmp_path):
    for number in (2, 1):
        write_parquet(tmp_path / f"data/part-{number}.parquet", text=[f"text {number}"])
    source = TextSource("calibration", dataset=str(tmp_path), data_files="data/part-*.parquet")
    assert list(source.documents()) == ["text 1", "text 2"]
    for outside in ("../x.parquet", "/x.parquet"):
        with pytest.raises(ValueError, match=r"^calibration\.data_files=.*must lie within dataset"):
            TextSource("calibration", dataset=str(tmp_path), data_files=outside)


BROKEN = {
    "cut.parquet": (b"PAR1 and no more", "could not be read"),
    "list.jsonl": (b'{"text": "a"}\n5\n', "could not be read"),
    "cut.json": (b'[{"text": "a"},', "could not be read"),
    "cut.json.gz": (gzip.compress(b'{"text": "a"}\n' * 999)[:-20], "could not be read"),
    "cut.txt.gz": (gzip.compress(b"text\n" * 999)[:-20], "could not be read"),
    "no.txt.xz": (b"not compressed", "could not be read"),
    "no.csv.bz2": (b"not compressed", "could not be read"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "could not be read"),
    "latin.jsonl": ('{"text": "naïve"}\n'.encode("latin-1"), "could not be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_told_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name][0])
    with pytest.raises(ValueError, match=rf"^calibration\.path={tmp_path / name}: .*{BROKEN[name][1]}") as caught:
        TextSource("calibration", path=str(tmp_path / name)).documents()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
