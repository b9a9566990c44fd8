"""Checks a saved pruned model against the dense one, a tensor at a time, without loading either.

    python benchmarks/memory/check_saved.py outputs/demo/2of4/wanda-1a2b3c4d/model --dense nnprune/data/demo --pattern 2:4

Every weight must be there under the same name, with the same shape and dtype as in the dense checkpoint, and finite;
every linear of the decoder layers must have the sparsity pattern; everything else must be the dense model's to the last
bit; and the index must tell where each weight is. Prints one line, or a line a fault; exit status 1 for any of them.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's packages, installed or not

import torch
from safetensors import safe_open
from torch import Tensor

from nnprune.model.checkpoint import Checkpoint, Header
from nnprune.model.decoder import Decoder
from nnprune.model.loading import ModelSource
from nnprune.patterns import PatternError, SparsityPattern, parse_pattern

CHUNK = 1 << 24
"""Values looked at together."""


class SavedCheck:
    """One comparison of two folders.

    Args:
        saved, dense: Hugging Face directories of the pruned and of the dense model.
        pattern: of every linear of the decoder layers.

    Raises:
        ValueError: a folder that is no model's, or whose safetensors cannot be read.
    """

    def __init__(self, saved: Path, dense: Path, pattern: SparsityPattern) -> None:
        source = ModelSource(str(dense))
        model = source.skeleton(source.config())
        decoder = Decoder(model)
        self.saved = saved
        self.pattern = pattern
        self.names = set(model.state_dict())
        self.tied = set(model.all_tied_weights_keys)
        self.linears = {
            f"{name}.weight": view for index in range(len(decoder.layers)) for name, view in decoder.weights(index).items()
        }
        if not (files := sorted(saved.glob("*.safetensors"))):
            raise ValueError(f"{saved}: has no safetensors files; name the folder of a saved model")
        self.saved_places = Checkpoint(files, model, str(saved)).places
        self.dense_places = Checkpoint(source.files.weights(), model, str(dense)).places
        self.zeros = self.num_weights = self.num_checked = 0

    def faults(self) -> Iterator[str]:
        """A line for everything that is wrong."""
        yield from self._index_faults()
        for name in sorted(self.names - self.tied - set(self.saved_places)):
            yield f"{name}: missing"
        for name in sorted(set(self.saved_places) - self.names):
            yield f"{name}: the dense model has no such weight"
        for name in sorted(self.names & set(self.saved_places)):
            if name in self.dense_places:
                yield from self._tensor_faults(name)
            elif name not in self.tied:
                yield f"{name}: missing in the dense checkpoint"

    def _index_faults(self) -> Iterator[str]:
        path = self.saved / "model.safetensors.index.json"
        if path.exists():
            found = {key: place.name for place, key, *_ in self.saved_places.values()}
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            for name in sorted(name for name in found.keys() | index.keys() if found.get(name) != index.get(name)):
                yield f"{name}: in {found.get(name, 'no file')}, and by the index in {index.get(name, 'none')}"
        elif len({place for place, *_ in self.saved_places.values()}) > 1:
            yield f"{path.name}: missing, with more than one file of weights"

    def _tensor_faults(self, name: str) -> Iterator[str]:
        saved, dense = _read(self.saved_places[name]), _read(self.dense_places[name])
        self.num_checked += 1
        if (saved.shape, saved.dtype) != (dense.shape, dense.dtype):
            yield f"{name}: {tuple(saved.shape)} {saved.dtype}, in the dense model {tuple(dense.shape)} {dense.dtype}"
            return
        if not all(chunk.isfinite().all() for chunk in _chunks(saved)):
            yield f"{name}: holds NaN or infinite values"
        if name in self.linears:
            weight_OI = self.linears[name].within(saved)
            self.num_weights += saved.numel()
            self.zeros += saved.numel() - int(saved.count_nonzero())
            try:
                self.pattern.check(weight_OI)
            except PatternError as error:
                yield f"{name}: {error}"
        elif not all(torch.equal(*map(_bits, pair)) for pair in zip(_chunks(saved), _chunks(dense), strict=True)):
            yield f"{name}: is no linear of a decoder layer, and differs from the dense model's"

    def summary(self) -> str:
        """What was checked, for when nothing is wrong."""
        num_others = self.num_checked - len(self.linears)
        return (
            f"{self.saved}: {len(self.linears)} linears have {self.pattern} ({self.zeros / self.num_weights:.4%} zeros), "
            f"{num_others} other tensors equal the dense model's bit for bit, all finite"
        )


def _read(place: Header) -> Tensor:
    with safe_open(place.path, "pt") as file:
        return file.get_tensor(place.key)


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """All values in flat pieces: what is computed of an embedding's need not fit in memory at once."""
    return tensor.reshape(-1).split(CHUNK)


def _bits(chunk: Tensor) -> Tensor:
    return chunk.view(torch.uint8)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saved", type=Path, metavar="DIR", help="the pruned model")
    parser.add_argument("--dense", type=Path, required=True, metavar="DENSE_DIR")
    parser.add_argument("--pattern", type=parse_pattern, required=True, help="such as 2:4 or 0.5")
    args = parser.parse_args(argv)
    for folder in (args.saved, args.dense):
        if not folder.is_dir():
            parser.error(f"{folder}: no such directory")
    try:
        check = SavedCheck(args.saved, args.dense, args.pattern)
    except ValueError as error:
        print(f"check_saved.py: {error}", file=sys.stderr)
        return 1
    faults = list(check.faults())
    print("\n".join(faults) or check.summary())
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
