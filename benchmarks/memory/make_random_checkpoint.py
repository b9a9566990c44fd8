"""Writes a random checkpoint in the shape of a named model, for what depends on shapes alone: memory and time.

    python benchmarks/memory/make_random_checkpoint.py DIR --preset opt-6.7b
    python benchmarks/memory/make_random_checkpoint.py DIR --preset llama-3-8b --layers 4
    python benchmarks/memory/make_random_checkpoint.py DIR --hidden 1024 --layers 12 --heads 16 --ffn 4096 --vocab 4096
    python benchmarks/memory/make_random_checkpoint.py DIR --config config.json      any decoder-only architecture

The result is an ordinary Hugging Face directory in bfloat16, with shards, names and an index as `save_pretrained` makes
them, tied weights stored once, and the embedded demo's tokenizer. Its perplexity means nothing.

The model exists on the meta device only, and the files are written a chunk of a parameter at a time, so that this program
needs a few hundred megabytes for a model of any size. Every value is drawn, none is repeated: matrices from a normal
distribution with the architecture's own standard deviation; norms are ones and biases zeros. Values are drawn on the CUDA
device where there is one, else on the CPU, whose generators differ: a parameter's values depend on the seed, its name, its
size and the kind of device, not on the shards.
"""

import argparse
import json
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's packages, installed or not

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from nnprune.texts import DEMO_FOLDER

PRESETS: dict[str, dict[str, Any]] = {
    "opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    },
    "opt-6.7b": {
        "model_type": "opt",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "ffn_dim": 16384,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
}
FIELDS = {  # option -> what architectures call it
    "hidden": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "ffn": ("ffn_dim", "intermediate_size", "n_inner", "ffn_hidden_size"),
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings",),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CHUNK = 1 << 22
"""Values drawn at once: 16 MiB in float32."""


def make_config(values: dict[str, Any], shape: dict[str, int]) -> PreTrainedConfig:
    """The configuration of `values`, among them `model_type`, with the options `shape` (a key of FIELDS -> size) put in.

    Special tokens are the demo's. Raises ValueError for an option that the architecture does not know, for sizes that do
    not go together, and for a vocabulary smaller than the demo's.
    """
    known = AutoConfig.for_model(values["model_type"])
    for option, size in shape.items():
        fields = [field for field in FIELDS[option] if hasattr(known, field)]
        if not fields:
            raise ValueError(f"--{option.replace('_', '-')}: {values['model_type']} has no {' or '.join(FIELDS[option])}")
        values = {**values, **dict.fromkeys(fields, size)}
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(**{**values, **special, "dtype": "bfloat16"})
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"--vocab {config.vocab_size}: the tokenizer has {len(tokenizer)} tokens; give at least that")
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads and heads % kv_heads:
        raise ValueError(f"--heads {heads}: is no multiple of {kv_heads} key-value heads; give --kv-heads too")
    return config


def meta_parameters(config: PreTrainedConfig) -> tuple[str, dict[str, nn.Parameter]]:
    """Class of the model, and name -> parameter on the meta device, each tied one once.

    Raises ValueError when the model's state holds more than parameters, which would be missing from the checkpoint.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    if others := set(model.state_dict()) - set(parameters) - set(model.all_tied_weights_keys):
        raise ValueError(f"{type(model).__name__} keeps {min(others)}, which is no parameter; choose another architecture")
    return type(model).__name__, parameters


def split(parameters: dict[str, nn.Parameter], shard_bytes: int) -> list[dict[str, nn.Parameter]]:
    """Consecutive parameters in shards of at most `shard_bytes`; a parameter larger than that has a shard of its own."""
    shards: list[dict[str, nn.Parameter]] = [{}]
    size = 0
    for name, parameter in parameters.items():
        if shards[-1] and size + parameter.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = parameter
        size += parameter.nbytes
    return shards


def random_values(name: str, parameter: nn.Parameter, std: float, seed: int) -> Iterator[Tensor]:
    """The values of a parameter in bfloat16 and in order, flat, at most CHUNK at once, on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode(), seed))
    for start in range(0, parameter.numel(), CHUNK):
        chunk = torch.empty(min(CHUNK, parameter.numel() - start), device=device)
        if parameter.ndim > 1:
            chunk.normal_(0, std, generator=generator)
        else:
            chunk.fill_(0 if name.endswith("bias") else 1)
        yield chunk.to(torch.bfloat16).cpu()


def write_shard(file: BinaryIO, shard: dict[str, nn.Parameter], std: float, seed: int) -> None:
    """Write one safetensors file as a stream; the library's own writer wants all of its tensors in memory.

    The format: the length of the header, the header as JSON, the values (https://github.com/huggingface/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, parameter in shard.items():
        end = offset + parameter.nbytes
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned in a mapped file
    file.write(len(text).to_bytes(8, "little") + text)
    for name, parameter in shard.items():
        for chunk in random_values(name, parameter, std, seed):
            file.write(chunk.view(torch.uint8).numpy())


def make_checkpoint(config: PreTrainedConfig, target: Path, seed: int, shard_bytes: int) -> None:
    """Write the checkpoint to `target`, which appears only once it is whole.

    Raises ValueError when `target` exists, and OSError when the disk has no room for it.
    """
    if target.exists():
        raise ValueError(f"{target}: exists already; remove it or name another folder")
    architecture, parameters = meta_parameters(config)
    config.architectures = [architecture]
    total = sum(parameter.nbytes for parameter in parameters.values())
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < total * 1.01:
        raise OSError(f"{target}: needs {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; name a folder on another disk")
    std = next(getattr(config, key) for key in ("initializer_range", "init_std") if hasattr(config, key))
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    shards = split(parameters, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        start = time.perf_counter()
        path = unfinished / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with path.open("wb") as file:
            write_shard(file, shard, std, seed)
        weight_map |= dict.fromkeys(shard, path.name)
        print(f"{path.name}  {path.stat().st_size / 1e9:.2f} GB  {time.perf_counter() - start:.0f} s", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config.save_pretrained(unfinished)
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO_FOLDER / name, unfinished / name)
    unfinished.replace(target)
    print(f"{target}: {architecture}, {sum(p.numel() for p in parameters.values()) / 1e9:.2f}e9 parameters")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, metavar="DIR", help="folder to make")
    parser.add_argument("--preset", choices=PRESETS, default="opt-1.3b", help="the shape to start from (default: %(default)s)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a model's config.json to start from instead")
    for option, fields in FIELDS.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, metavar="N", help=" or ".join(fields))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=5, help="largest shard, in 1e9 bytes (default: %(default)s)")
    args = parser.parse_args(argv)
    values = json.loads(args.config.read_text()) if args.config else PRESETS[args.preset]
    shape = {option: getattr(args, option) for option in FIELDS if getattr(args, option) is not None}
    try:
        make_checkpoint(make_config(values, shape), args.target, args.seed, int(args.shard_gb * 1e9))
    except (ValueError, OSError) as error:
        print(f"make_random_checkpoint.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
