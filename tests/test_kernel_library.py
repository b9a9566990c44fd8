"""How the C library is compiled, cached and distrusted; and life without a compiler."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nnprune.kernels import gram, library, sweep


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As a process begins that has compiled nothing yet; the cache's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._load.cache_clear()
    yield tmp_path / "nnprune"
    library._load.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_pytorch_serves(
    compiler: str, unloaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.INFO):
        assert library.library() is None
        assert not sweep.available()
        assert not gram.multiply_bfloat16(torch.ones(1, dtype=torch.bfloat16))
    assert len(caplog.messages) == 1
    assert "using PyTorch instead" in caplog.text
    assert not list(unloaded.glob("*"))


def test_they_are_compiled_once_and_no_half_written_file_is_left(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.library() is None:
        pytest.skip("this machine compiles no C")
    (compiled,) = unloaded.glob("*")
    library._load.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    assert library.library() is not None
    assert list(unloaded.glob("*")) == [compiled]


@pytest.fixture
def cached(unloaded: Path) -> Path:
    """The compiled library, as a later process finds it."""
    if library.library() is None:
        pytest.skip("this machine compiles no C")
    (compiled,) = unloaded.glob("*")
    library._load.cache_clear()
    return compiled


def test_the_cache_is_private(cached: Path) -> None:
    assert [path.stat().st_mode & 0o777 for path in (cached.parent, cached)] == [0o700, 0o700]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "moved.so")
    path.symlink_to(path.parent.parent / "moved.so")


DAMAGES = [
    (truncate, "is damaged"),
    (lambda path: os.truncate(path, 0), "is damaged"),
    (flip_a_bit, "is damaged"),
    (lambda path: path.chmod(0o722), "is writable for others"),
    (replace_by_link, "is not a regular file"),
    (lambda path: path.parent.chmod(0o777), "was writable for others"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES, ids=["truncated", "empty", "bit", "mode", "link", "folder"])
def test_a_library_that_cannot_be_trusted_is_compiled_again(damage, problem, cached, caplog) -> None:
    intact = cached.read_bytes()
    damage(cached)
    with caplog.at_level(logging.INFO):
        assert library.library() is not None
    assert len(caplog.messages) == 1
    assert problem in caplog.text
    assert "compiled again" in caplog.text
    assert list(cached.parent.iterdir()) == [cached]
    assert not cached.is_symlink()
    assert cached.read_bytes() == intact
    assert [path.stat().st_mode & 0o777 for path in (cached.parent, cached)] == [0o700, 0o700]


def owned_by_another(monkeypatch: pytest.MonkeyPatch, foreign: Path) -> None:
    """Let `os.stat` and `os.lstat` report another owner of this path."""
    for name in ("stat", "lstat"):
        original = getattr(os, name)

        def other(path, *arguments, original=original, **options):
            found = original(path, *arguments, **options)
            if not isinstance(path, int) and os.fspath(path) == os.fspath(foreign):
                found = os.stat_result([*found[:4], found.st_uid + 1, *found[5:]])
            return found

        monkeypatch.setattr(os, name, other)


def test_a_library_of_another_user_is_compiled_again(cached, monkeypatch, caplog) -> None:
    before = cached.stat().st_ino
    handle = cached.open("rb")  # or the new file might get the same number
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        owned_by_another(patch, cached)
        assert library.library() is not None
    handle.close()
    assert "belongs to another user; compiled again" in caplog.text
    assert cached.stat().st_ino != before


def test_a_folder_of_another_user_is_not_used(cached, monkeypatch, caplog) -> None:
    shutil.copy(cached, cached.with_name("planted.so"))
    before = sorted(cached.parent.iterdir())
    monkeypatch.setattr(library, "_load_cached", lambda folder, key: None if folder != cached.parent else pytest.fail("used"))
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        owned_by_another(patch, cached.parent)
        assert library.library() is not None
    assert "belongs to another user; compiled for this process alone" in caplog.text
    assert sorted(cached.parent.iterdir()) == before


def test_processes_that_compile_at_once_leave_one_library(unloaded: Path) -> None:
    code = "from nnprune.kernels import library; print(library.library() is not None)"
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=300)[0].strip() for process in processes}
    if answers == {"False"}:
        pytest.skip("this machine compiles no C")
    assert answers == {"True"}
    assert len(list(unloaded.iterdir())) == 1
