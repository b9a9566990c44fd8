"""What may happen to a file of an unfinished run."""

from pathlib import Path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    """Exchange a layer's file with that of the next layer."""
    other = path.with_name(f"layer-{int(path.stem.removeprefix('layer-')) + 1:04}{path.suffix}")
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)
