"""Shared fixtures. Nothing here or in any test reaches for the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: threads on busy cores only wait for each other

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hypothesis import settings
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedConfig, PreTrainedTokenizerFast

from nnprune.experiment import command_line
from nnprune.kernels.library import enable, library
from nnprune.run import CONF, main

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
HANGS = 1200  # seconds after which a program from outside counts as hung, on a machine of a tenth of the usual speed too

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
settings.register_profile("the same examples everywhere", derandomize=True, deadline=None)
settings.load_profile("the same examples everywhere")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 259 tokens: three special ones and the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_random(config: PreTrainedConfig, folder: Path) -> Path:
    """Write a random model of this configuration and the byte tokenizer, as a Hugging Face directory."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OPT of 2 layers with a byte tokenizer, as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("models") / "tiny-opt"
    config = OPTConfig(
        vocab_size=264,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        init_std=0.2,
    )
    return save_random(config, folder)


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of a few thousand bytes, a paragraph a line."""
    path = tmp_path_factory.mktemp("texts") / "small.txt"
    path.write_text("\n".join(f"Line {i} tells of {i * i} things and of nothing else." for i in range(120)), encoding="utf-8")
    return path


@pytest.fixture(scope="session", params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> str:
    """Tests that use it run on the CPU and, where there is one, on a CUDA device. All others are of the CPU."""
    return request.param


@pytest.fixture
def tiny_config(
    request: pytest.FixtureRequest, tiny_model_dir: Path, small_text: Path, tmp_path: Path
) -> Callable[..., DictConfig]:
    """`tiny_config("pruner=wanda", ...)`: the config of a run of well under a second, with records in `tmp_path`."""
    device = request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"

    def make(*overrides: str) -> DictConfig:
        cfg = compose_config(
            "model=local",
            f"model.path={tiny_model_dir}",
            "calibration=text",
            f"calibration.path={small_text}",
            "calibration.num_samples=6",
            "calibration.seq_len=32",
            "evaluation=text",
            f"evaluation.path={small_text}",
            "evaluation.seq_len=32",
            "evaluation.max_windows=5",
            "runtime.batch_tokens=128",
            f"runtime.device={device}",
            *overrides,
        )
        if cfg.outputs == "outputs":  # set afterwards: configs that differ in nothing else are composed once
            cfg.outputs = str(tmp_path / "outputs")
        return cfg

    return make


def compose_config(*overrides: str) -> DictConfig:
    """The config of a command line. Composing the groups takes Hydra 0.1 s, so that is done once for all values of their settings."""
    try:
        values = [one for one in OverridesParser.create().parse_overrides(list(overrides)) if _is_value(one)]
        given = {one.input_line for one in values}
        cfg = copy.deepcopy(_compose(tuple(one for one in overrides if one not in given)))
        for one in values:
            OmegaConf.update(cfg, one.key_or_group, one.value())
    except (HydraException, OmegaConfBaseException):  # Hydra says what is wrong
        return copy.deepcopy(_compose(overrides))
    return cfg


def _is_value(override: Override) -> bool:
    is_plain = override.type is OverrideType.CHANGE and not override.is_sweep_override() and override.package is None
    return is_plain and ("." in override.key_or_group or override.key_or_group in ("outputs", "seed", "save", "label"))


@cache
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture
def run_cli() -> Callable[..., subprocess.CompletedProcess]:
    """`run_cli("sparsity=2:4", ..., cwd=...)`: the program from outside, on the CPU."""

    def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        command, environment = [sys.executable, "-m", "nnprune.run", *arguments], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)

    return run


@pytest.fixture
def call_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """`call_main("sparsity=2:4", ...)`: the program's exit status and stderr, in this process and on the CPU."""
    defaults = {"outputs": str(tmp_path / "outputs"), "runtime.device": "cpu"}

    def call(*arguments: str) -> tuple[int, str]:
        given = {argument.partition("=")[0] for argument in arguments}
        added = [f"{key}={value}" for key, value in defaults.items() if key not in given]
        silent = ("hydra/job_logging=none", "hydra/hydra_logging=none")
        monkeypatch.setattr(sys, "argv", ["nnprune", *arguments, *added, *silent])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(command_line, "failures", None)
        monkeypatch.setattr("signal.signal", lambda *_: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        text = left.value.code if isinstance(left.value.code, str) else ""
        return (1 if text else left.value.code), text + capsys.readouterr().err

    return call


@pytest.fixture(scope="module", params=["native", "pytorch"])
def native(request: pytest.FixtureRequest) -> Iterator[str]:
    """Tests that use it run with the kernels in C, where they can be compiled, and with PyTorch's operations alone."""
    if request.param == "native" and library() is None:
        pytest.skip("this machine compiles no C")
    enable(request.param == "native")
    yield request.param
    enable(True)


SLOWEST = (
    "test_sweep_command.py",
    "test_resume.py",
    "test_robust_numbers.py",
    "test_examples.py",
    "test_hub.py",
    "test_cost_estimate.py",
)
"""Files that run first: one that began when the others are done would keep all processes but one waiting."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in SLOWEST)
