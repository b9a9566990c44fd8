"""Local files of text: which file is read, formats, compression, byte-order marks, and files that cannot be read."""

import bz2
import gzip
import json
import lzma

import pandas as pd
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


DOCUMENTS = ["first tale, of a river", "second: ünïcode ✓", "third one\nof two lines"]
WRITERS = {
    "a.txt": lambda path: path.write_text("\n\n".join(DOCUMENTS) + "\n\n\n", encoding="utf-8"),
    "a.jsonl": lambda path: write_jsonl(path, [{"text": text} for text in DOCUMENTS]),
    "a.jsonl.gz": lambda path: write_jsonl(path, [{"text": text} for text in DOCUMENTS]),
    "v1.2.json.gz": lambda path: write_jsonl(path, [{"id": 1, "text": text} for text in DOCUMENTS]),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in DOCUMENTS]), encoding="utf-8"),
    "a.parquet": lambda path: write_parquet(path, text=DOCUMENTS, number=[1, 2, 3]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_holds_the_same_documents(tmp_path, name):
    WRITERS[name](tmp_path / name)
    source = TextSource("calibration", path=str(tmp_path / name))
    source.check()
    assert list(source.documents()) == DOCUMENTS
    assert source.joined() == "\n\n".join(DOCUMENTS)
    assert list(TextSource("calibration", path=str(tmp_path / name), max_documents=2).documents()) == DOCUMENTS[:2]


def zstd(content):
    return pytest.importorskip("zstandard").compress(content)


COMPRESSED = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_compressed_files_hold_the_same_documents(tmp_path, name, ending):
    if name == "a.csv":
        pd.DataFrame({"text": DOCUMENTS, "number": [1, 2, 3]}).to_csv(tmp_path / name, index=False)
    else:
        WRITERS[name](tmp_path / name)
    (tmp_path / f"{name}{ending}").write_bytes(COMPRESSED[ending]((tmp_path / name).read_bytes()))
    for path in (tmp_path / name, tmp_path / f"{name}{ending}"):
        source = TextSource("calibration", path=str(path))
        source.check()
        assert list(source.documents()) == DOCUMENTS


def test_what_a_compression_needs(tmp_path, monkeypatch):
    for name in ("a.parquet.gz", "a.tar.gz", "a.txt.lz4", "a.gz"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"^calibration\.path={tmp_path / name}: must be a \.txt, \.jsonl, .*\.zst"):
            TextSource("calibration", path=str(tmp_path / name)).check()
    (tmp_path / "a.txt.zst").touch()
    monkeypatch.setattr("nnprune.files.text_files.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a\.txt\.zst: needs a package that is not installed; pip install 'nnprune\[zstd\]'"):
        TextSource("calibration", path=str(tmp_path / "a.txt.zst")).check()


def test_text_is_taken_literally(tmp_path):
    """Not what pandas takes for a missing value, nor what Python takes for the end of a line."""
    (tmp_path / "a.csv").write_text('text,number\nNA,1\nnull,2\n"",3\nlast,4\n')
    assert list(TextSource("calibration", path=str(tmp_path / "a.csv")).documents()) == ["NA", "null", "last"]
    (tmp_path / "a.txt").write_text("a\fb\u2028c\nd\n", encoding="utf-8")
    assert TextSource("calibration", path=str(tmp_path / "a.txt")).joined() == "a\fb\u2028c\nd"


def test_null_among_token_ids(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2]}, {"input_ids": None}, {"input_ids": [1, None, 3]}])
    with pytest.raises(ValueError, match=r"^calibration\.path=.*: has null among the token ids of input_ids; leave it out"):
        TextSource("calibration", path=str(tmp_path / "a.jsonl"), column="input_ids").rows()
