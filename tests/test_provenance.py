"""The provenance of a record: package versions and the commit of this checkout."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from conftest import compose_config
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from nnprune.experiment import provenance
from nnprune.experiment.build import build
from nnprune.experiment.provenance import PACKAGES, command, commit, machine, versions
from nnprune.run import CONF


def git(folder, *arguments) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit in place of this one."""
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "result.json").write_text("{}")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "all")
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    return tmp_path


def test_a_commit_is_dirty_only_where_tracked_code_differs(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert commit() == (head, False)
    (checkout / "new.py").write_text("2\n")
    (checkout / "outputs" / "result.json").write_text("{ }")
    assert commit() == (head, False)
    (checkout / "code.py").write_text("3\n")
    assert commit() == (head, True)


@pytest.mark.parametrize("has_repository", [False, True])
def test_without_a_commit_there_is_none(has_repository, tmp_path, monkeypatch):
    if has_repository:
        git(tmp_path, "init", "-q")
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    assert commit() == (None, None)


def test_versions_are_those_of_this_process(monkeypatch):
    found = versions("cpu")
    assert list(found) == ["python", *PACKAGES, "kernels"]
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    monkeypatch.setattr(provenance, "library", lambda: None)
    assert versions("cpu")["kernels"] == "PyTorch"
    monkeypatch.setattr(provenance, "library", lambda: object())
    assert versions("cpu")["kernels"] == "C"


def test_a_checkout_that_is_not_installed_says_so(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(provenance, "version", missing)
    assert {versions("cpu")[package] for package in PACKAGES} == {"not installed"}


def test_the_command_is_that_of_one_run(monkeypatch):
    overrides = ["pruner=wanda", "sparsity=0.7", "label=a b"]
    experiment = build(compose_config(*overrides))
    assert command(experiment) is None
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides, return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    assert command(experiment) == "nnprune pruner=wanda sparsity=0.7 'label=a b'"
    assert command(experiment.dense()) == "nnprune pruner=wanda sparsity=dense 'label=a b'"
    cfg.hydra.overrides.task = ["pruner=wanda"]
    assert command(experiment.dense()) == "nnprune pruner=wanda sparsity=dense"


def test_a_record_names_the_machine():
    found = machine(torch.device("cpu"))
    assert found["cpu"] and not found["cpu"].isspace()
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["host_bytes"] > 2**28
    assert "gpu" not in found
