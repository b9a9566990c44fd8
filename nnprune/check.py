"""Checks a saved pruned model, a tensor at a time: `nnprune-check DIR`, or `python -m nnprune.check DIR`.

Patterns, and all tensors that the run left as they were, are compared with what `pruning.json` says and with the base model that
it names. Prints a line an aspect; exit status 1 if anything is wrong.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nnprune.checks import is_finite
from nnprune.model.checkpoint import FLOATS, Checkpoint, read_headers
from nnprune.model.decoder import Decoder
from nnprune.model.export import SUMMARY, changed_names
from nnprune.model.loading import ModelSource, quieten_transformers
from nnprune.model.masks import MaskFile
from nnprune.model.model_files import SAFETENSORS_INDEX, read_json
from nnprune.model.scales import SCALES, grid_of, pruned_linears
from nnprune.patterns import PatternError, parse_pattern, zeros_in

CHUNK = 1 << 22
"""Values looked at together."""

SHOWN = 3
"""Faults of an aspect that are printed."""


class SavedModel:
    """A saved model and, once `open_base` found it, its base.

    Raises ValueError, one line, for a folder that holds no saved model or whose files cannot be read.
    """

    def __init__(self, folder: Path, trust_remote_code: bool) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such directory; name the folder of a saved model")
        self.folder = folder
        self.summary = read_json(folder / SUMMARY, str(folder))
        try:
            settings, selection = self.summary["config"]["model"], self.summary.get("selection")
            self.chosen = f" of {selection['all_linears']}" if selection else ""
            self.linears = {
                one["name"]: (parse_pattern(one["pattern"]), float(one["sparsity"])) for one in self.summary["per_linear"]
            }
            self.base_model = (self.summary["base_model"]["path"], self.summary["base_model"]["commit"])
            self.linear_sparsity = float(self.summary["linear_sparsity"])
            self.is_tuned = bool(self.summary["recovered"])
            layers_path = settings["layers_path"]
            self.grid = grid_of(quantization) if (quantization := self.summary.get("quantization")) else None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: {SUMMARY} is no record of a saved model ({error!r})") from error
        self.source = ModelSource(str(folder), layers_path=layers_path, trust_remote_code=trust_remote_code)
        self.source.tokenizer()
        self.model = self.source.skeleton(self.source.config())
        self.checkpoint = Checkpoint(self.source.files.weights(), self.model, str(folder))
        decoder = Decoder(self.model, layers_path)
        self.views = {name: view for index in range(len(decoder.layers)) for name, view in decoder.weights(index).items()}
        inside = {name for name in self.model.state_dict() if name.startswith(f"{decoder.path}.")}
        self.changed = changed_names(inside, self.summary)
        self.base: Checkpoint | None = None

    def open_base(self, path: str | None) -> str:
        """Find the base model, fetching it from the hub if need be, and return what it is called. Raises ValueError if it is not to be
        had."""
        recorded, commit = self.base_model
        revision = commit if path in (None, recorded) else None
        source = ModelSource(path or recorded, revision=revision)
        self.base = Checkpoint(source.files.weights(), self.model, source.label)
        return f"{source.origin} at {source.commit}" if source.commit else source.origin

    def faults_of_files(self) -> Iterator[str]:
        """Shards, index, names, and shapes."""
        found = {key: header.path.name for key, header in self.checkpoint.headers.items()}
        used = Counter(header.key for path in self.source.files.weights() for header in read_headers(path, str(self.folder)))
        yield from (f"{key} is in {number} files" for key, number in used.items() if number > 1)
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in {*found.values(), *([SCALES] if self.grid else [])}:
                yield f"{path.name} is no part of the checkpoint"
        if (self.folder / SAFETENSORS_INDEX).is_file():
            index = read_json(self.folder / SAFETENSORS_INDEX, str(self.folder))
            placed, metadata = index["weight_map"], index.get("metadata")
            size = metadata.get("total_size") if isinstance(metadata, dict) else None
            for key in sorted(key for key in found.keys() | placed.keys() if found.get(key) != placed.get(key)):
                yield f"{key} is in {found.get(key, 'no file')}, by the index in {placed.get(key, 'none')}"
            if size != (total := sum(header.num_bytes for header in self.checkpoint.headers.values())):
                yield f"{SAFETENSORS_INDEX} says total_size {size}, the tensors have {total} bytes"
        if self.base is not None:
            yield from (f"{key} is missing" for key in sorted(self.base.headers.keys() - found.keys()))
            yield from (f"{key} is not in the base model" for key in sorted(found.keys() - self.base.headers.keys()))

    def faults_of_patterns(self) -> Iterator[str]:
        """The zeros of every linear of the plan: as the pattern asks, and as many as were counted."""
        zeros = size = 0
        held = tensor = None
        for name, (pattern, sparsity) in self.linears.items():
            if name not in self.views or (weight := self.views[name].key) not in self.checkpoint:
                yield f"{name} is no linear of the decoder layers"
                continue
            if weight != held:  # all experts of a layer share one
                held, tensor = weight, self.checkpoint.read([weight])[weight]
            weight_OI = self.views[name].within(tensor)
            found, counted = zeros_in(weight_OI), round(sparsity * weight_OI.numel())
            zeros, size = zeros + found, size + weight_OI.numel()
            try:
                pattern.check(weight_OI)
            except PatternError as error:
                yield f"{name} {error}"
            else:
                if found < counted or (found > counted and not self.is_tuned):
                    yield f"{name} has {found} zeros, by the record {counted}"
        if size and zeros / size != self.linear_sparsity:
            yield f"the linears have {zeros / size:.6%} zeros, by the record {self.linear_sparsity:.6%}"

    def faults_of_grid(self) -> Iterator[str]:
        """Weights that are no level times their scale."""
        path = self.folder / SCALES
        if not path.is_file():
            yield f"{SCALES} is missing"
            return
        headers = {header.key: header for header in read_headers(path, str(self.folder))}
        wanted = pruned_linears(self.summary["per_linear"])
        yield from (f"{name} is not in {SCALES}" for name in sorted(wanted - headers.keys()))
        yield from (f"{name} of {SCALES} is no pruned linear" for name in sorted(headers.keys() - wanted))
        for name in sorted(wanted & headers.keys() & self.views.keys()):
            view = self.views[name]
            try:
                weight_OI = view.within(self.checkpoint.read([view.key])[view.key])
                self.grid.levels(weight_OI, self.checkpoint.tensor(headers[name]))
            except (ValueError, RuntimeError) as error:
                yield f"{name}: {error}"

    def write_masks(self, path: Path) -> None:
        """Write the masks of the plan's linears to a file, one for each tensor: experts may share it."""
        masks = MaskFile()
        for key in dict.fromkeys(self.views[name].key for name in self.linears):
            masks.add(key, self.checkpoint.read([key])[key])
        masks.write(path)

    def faults_of_values(self) -> Iterator[str]:
        """NaN and infinities."""
        for key, header in self.checkpoint.headers.items():
            if header.dtype in FLOATS and not all(map(is_finite, _chunks(self.checkpoint.tensor(header)))):
                yield f"{key} holds NaN or infinite values"

    def faults_of_others(self) -> Iterator[str]:
        """Tensors that the run left alone, against the base model's."""
        for key in sorted(self.untouched()):
            saved, base = self.checkpoint.headers[key], self.base.headers[key]
            if (saved.shape, saved.dtype) != (base.shape, base.dtype):
                yield f"{key} is {saved.dtype} {saved.shape}, in the base model {base.dtype} {base.shape}"
                continue
            pairs = zip(_chunks(self.checkpoint.tensor(saved)), _chunks(self.base.tensor(base)), strict=True)
            if not all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairs):
                yield f"{key} differs from the base model's"

    def untouched(self) -> set[str]:
        """The keys of what the run left alone."""
        keys = {key for key in self.checkpoint.headers if not self.checkpoint.weights_of(key) & self.changed}
        return keys if self.base is None else keys & self.base.headers.keys()


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """All values in flat pieces, none for an empty tensor: an embedding's need not fit in memory at once."""
    return tensor.contiguous().reshape(-1).split(CHUNK) if tensor.numel() else ()


def _report(aspect: str, summary: str, faults: Iterator[str]) -> bool:
    """Print the line of an aspect. Returns whether it is right."""
    found = list(faults)
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    print(f"{aspect:10}{'FAULT' if found else 'ok':7}{'; '.join(found[:SHOWN]) + more if found else summary}", flush=True)
    return not found


def _check(args: argparse.Namespace) -> bool:
    saved = SavedModel(args.folder, args.trust_remote_code)
    print(f"{'load':10}{'ok':7}config.json and the tokenizer load with transformers", flush=True)
    base, reason = None, ""
    try:
        base = saved.open_base(args.base)
    except (ValueError, OSError) as error:
        reason = str(error)
        if args.base:
            raise
    num_tensors, num_untouched = len(saved.checkpoint.headers), len(saved.untouched())
    patterns = ", ".join(sorted({str(pattern) for pattern, _ in saved.linears.values()})) or "no pattern"
    is_right = [
        _report("files", f"{num_tensors} tensors in {len(saved.source.files.weights())} files", saved.faults_of_files()),
        _report(
            "patterns",
            f"{len(saved.linears)}{saved.chosen} linears have {patterns}, zeros as recorded",
            saved.faults_of_patterns(),
        ),
        _report("values", f"{num_tensors} tensors are finite", saved.faults_of_values()),
    ]
    if saved.grid:
        text = f"kept weights are levels of {saved.grid.bits} bits times the scales in {SCALES}"
        is_right.append(_report("grid", text, saved.faults_of_grid()))
    if base is None:
        what = f"names and the {num_untouched} tensors that were left alone are not compared with the base model"
        print(f"{'base':10}{'--':7}{what}: {reason}")
    else:
        is_right.append(
            _report("base", f"{num_untouched} other tensors are those of {base}, bit for bit", saved.faults_of_others())
        )
    if args.masks and all(is_right):
        saved.write_masks(args.masks)
        print(f"{'masks':10}{'ok':7}{args.masks}")
    return all(is_right)


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="nnprune-check", description="Check a pruned model that save=true wrote.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the saved model")
    parser.add_argument("--base", metavar="DIR_OR_HUB_ID", help="the base model, if it is not where the record says")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code that comes with the model")
    parser.add_argument(
        "--masks", type=Path, metavar="FILE", help="write the masks of its pruned weights, a bit a weight, as safetensors"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parser().parse_args(argv)
    quieten_transformers()
    try:
        return 0 if _check(args) else 1
    except (ValueError, OSError) as error:
        print(f"Error: {' '.join(str(error).split())}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
