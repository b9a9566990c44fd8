"""The README's commands are real ones: each composes, each option of the collector exists, each file named is there."""

import re
import runpy
import shlex

import pytest
from conftest import ROOT, compose_config
from omegaconf import OmegaConf

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```(?:bash)?\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
RUNS = sorted(
    set(re.findall(r"python -m nnprune\.run\b(.*)", BLOCKS) + re.findall(r"`python -m nnprune\.run\b([^`]*)`", README))
)
COLLECTS = re.findall(r"python scripts/collect\.py\b(.*)", BLOCKS)
FLAGS = ("-m", "--cfg", "job")


def choices(override: str) -> list[str]:
    """Each override that a sweep makes of one."""
    key, _, value = override.partition("=")
    return [override] if value.startswith("[") else [f"{key}={choice}" for choice in value.split(",")]


@pytest.mark.parametrize("arguments", RUNS)
def test_every_run_composes(arguments):
    overrides = [word for word in shlex.split(arguments) if word not in FLAGS and "hydra" not in word]
    for override in overrides:
        if override.startswith(("pruner._target_", "+pruner.alpha")):
            continue  # run for real by test_custom_pruner.py
        for choice in choices(override):
            context = ["model=local"] if choice.startswith(("calibration.", "evaluation.", "model.")) else []
            context += [word for word in overrides if word.startswith(("calibration=", "evaluation="))]
            OmegaConf.to_container(compose_config(*context, choice))


def test_there_are_runs_and_collects():
    assert len(RUNS) >= 7
    assert len(COLLECTS) >= 5


@pytest.mark.parametrize("arguments", COLLECTS)
def test_every_collect_parses(arguments):
    parse_args = runpy.run_path(str(ROOT / "scripts" / "collect.py"))["parse_args"]
    parse_args(shlex.split(arguments))


def test_every_file_named_exists():
    table = README.split("## Files")[1]
    named = [name for name in re.findall(r"`([\w/]+(?:\.py|/))`", table) if name != "outputs/readme/"]
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "nnprune" / name).exists(), name


def test_every_module_is_in_the_table_of_files():
    table = README.split("## Files")[1]
    for path in (ROOT / "nnprune").glob("*.py"):
        assert path.name == "__init__.py" or path.name in table, path.name


def test_every_option_is_in_the_table_of_options():
    for group in ("pruner", "allocation", "calibration", "evaluation", "runtime", "experiment"):
        [row] = re.findall(rf"^\| `{group}` \|.*$", README, re.MULTILINE)
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"`{path.stem}`" in row, (group, path.stem)
