"""Journals of an unfinished run: JSON with a checksum, as good as absent where damaged."""

import pytest

from nnprune.records import read_journal, write_journal


def test_a_journal_is_read_as_it_was_written(tmp_path):
    path, content = tmp_path / "new" / "journal.json", {"ünïcode": [0.1 + 0.2, None, 1e-300], "b": {"a": True}}
    assert read_journal(path) is None
    write_journal(path, content)
    assert read_journal(path) == content


JOURNAL_DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "another number": lambda path: path.write_text(path.read_text().replace("1.5", "1.6")),
    "another key": lambda path: path.write_text(path.read_text().replace('"a"', '"b"')),
    "empty": lambda path: path.write_text(""),
    "a list": lambda path: path.write_text("[]"),
    "nested too deeply": lambda path: path.write_text("[" * 100_000),
    "another checksum": lambda path: path.write_text('{"sha256": "0", "content": {"a": 1.5}}'),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "no checksum": lambda path: path.write_text('{"a": 1.5}'),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", JOURNAL_DAMAGES)
def test_a_damaged_journal_is_as_good_as_none_and_told_of_once(damage, tmp_path, caplog):
    path = tmp_path / "journal.json"
    write_journal(path, {"a": 1.5})
    JOURNAL_DAMAGES[damage](path)
    assert read_journal(path) is None
    [message] = caplog.messages
    assert str(path) in message and "damaged" in message
    if path.is_file():
        write_journal(path, {"a": 1.5})
        assert read_journal(path) == {"a": 1.5}
