"""The README, the documents and the examples: each command composes, each option exists, each path and link leads somewhere."""

import re
import shlex

import pytest
from conftest import ROOT, compose_config
from omegaconf import OmegaConf

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = sorted((ROOT / "examples").glob("*/*.sh")) + sorted((ROOT / "examples").glob("*/*.sbatch"))
EXTRA = {"lm_eval": "lm_eval", "mlflow": "mlflow"}
"""What an example needs of an optional package -> the package."""


def commands(program: str) -> list[str]:
    """What follows `program` in the fenced blocks and the inline code of all documents."""
    found = set()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        blocks = "\n".join(re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
        plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        found |= set(re.findall(rf"{program}\b(.*)", blocks)) | set(re.findall(rf"`{program}\b([^`]*)`", plain))
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ").replace(' "$@"', "")
        found |= set(re.findall(rf"{program}\b(.*)", text))
    return sorted({re.split(r" #| > | \| ", line)[0].rstrip(" &") for line in found if "..." not in line})


RUNS = commands(r"python -m nnprune\.run")
COLLECTS = commands(r"(?:python scripts/collect\.py|python -m nnprune\.collect|nnprune-collect)")
CHECKS = commands("(?:nnprune-check|python -m nnprune.check)")
FILES = commands("python")
FLAGS = ("-m", "--cfg", "job")


def choices(override: str) -> list[str]:
    """Each override that a sweep makes of one."""
    key, _, value = override.partition("=")
    return [override] if value.startswith("[") else [f"{key}={choice}" for choice in value.split(",")]


@pytest.mark.parametrize("arguments", RUNS)
def test_every_run_composes(arguments):
    """Each choice of a sweep, beside the first or last ones of the others."""
    words = [word for word in shlex.split(arguments) if word not in FLAGS and "hydra" not in word]
    words = [word for word in words if not word.startswith(("pruner._target_", "+pruner.alpha"))]  # see test_custom_pruner.py
    words = [word for word in words if word not in ("pruner=stade", "pruner=NAME,sparsegpt,wanda")]  # those of docs/pruner.md
    if "--config-dir" in words:
        pytest.skip("composed and run by test_examples.py")
    for name, package in EXTRA.items():
        if any(word.endswith(f"={name}") for word in words):
            pytest.importorskip(package)
    sweeps = [choices(word) for word in words if "(" not in word]  # a function of Hydra's sweeps: see test_sparsity_options.py
    for place in range(max(map(len, sweeps), default=1)):
        OmegaConf.to_container(compose_config(*(sweep[min(place, len(sweep) - 1)] for sweep in sweeps)))


def test_there_are_runs_and_collects():
    assert len(RUNS) >= 20
    assert len(COLLECTS) >= 5


@pytest.mark.parametrize("arguments", COLLECTS)
def test_every_collect_parses(arguments, capsys):
    from nnprune.collect import parse_args

    if "--help" not in arguments:
        parse_args(shlex.split(arguments))


@pytest.mark.parametrize("arguments", CHECKS)
def test_every_check_parses(arguments):
    from nnprune.check import parser

    if arguments:
        parser().parse_args(shlex.split(arguments.replace('"$model"', "DIR")))


def test_every_python_file_of_a_command_exists():
    named = {shlex.split(line)[0] for line in FILES if line.strip() and ".py" in line and not line.startswith((" -", "3"))}
    paths = {path for path in named if "/" in path}
    assert len(paths) >= 5
    assert not [path for path in paths if not (ROOT / path).is_file()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_the_table_of_options_is_that_of_conf():
    """Pruners may be more: a new one is a file in nnprune/pruners/ and one in conf/pruner/, and nothing else."""
    groups = ("pruner", "allocation", "target", "update", "recover", "calibration", "evaluation", "runtime", "experiment")
    for group in groups:
        [row] = re.findall(rf"^\| `{group}` \|.*$", README, re.MULTILINE)
        named = set(re.findall(r"`([\w.]+)`", row)) - {group}
        files = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        assert named <= files, (group, named - files)
        assert group == "pruner" or named == files, (group, files - named)
