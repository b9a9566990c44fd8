"""What is published: a wheel that is complete without the checkout, and a source distribution that is complete with its documents."""

import os
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib import import_module

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("nnprune-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_conf_and_the_demo(unpacked):
    shipped = {str(path.relative_to(unpacked / "nnprune" / "conf")) for path in (unpacked / "nnprune" / "conf").rglob("*.yaml")}
    assert shipped == {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    demo = unpacked / "nnprune" / "data" / "demo"
    assert {"config.json", "model.safetensors", "tokenizer.json", "test.txt", "calibration.txt"} <= {
        p.name for p in demo.iterdir()
    }
    assert (demo / "model.safetensors").stat().st_size < 8_000_000
    report = {path.name for path in (unpacked / "nnprune" / "report").iterdir()}
    assert {"page.html", "page.css", "page.js", "methods.bib"} <= report
    assert not (unpacked / "tests").exists()
    assert (unpacked / "nnprune" / "py.typed").is_file()


def test_every_command_of_the_wheel_exists(unpacked):
    [path] = unpacked.glob("nnprune-*.dist-info/entry_points.txt")
    (parser := ConfigParser()).read(path)
    commands = dict(parser["console_scripts"])
    assert {"nnprune", "nnprune-check"} <= commands.keys()
    for target in commands.values():
        module, name = target.split(":")
        assert callable(getattr(import_module(module), name))


def test_the_source_distribution_holds_documents_and_examples(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [path] = tmp_path.glob("nnprune-*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = ("*.md", "docs/*.md", "examples/*/*", "examples/*.*", "benchmarks/*.py", "tests/*.py", "mkdocs.yml", "Dockerfile")
    wanted = {file.relative_to(ROOT).as_posix() for pattern in tracked for file in ROOT.glob(pattern) if file.is_file()}
    assert wanted <= held, wanted - held
    assert not {name for name in held if name.startswith("outputs/") or "__pycache__" in name}


def test_console_script_runs_from_any_folder(unpacked, tmp_path):
    """With nothing of the checkout in reach, and a pruner in the user's folder."""
    (tmp_path / "mine.py").write_text(
        "import nnprune\n\nclass Mine(nnprune.ScorePruner):\n    def score(self, W, module_name):\n        return W.abs().float()\n"
    )
    script = "import sys, nnprune; assert 'site' in nnprune.__file__; from nnprune.run import main; sys.exit(main())"
    arguments = ["pruner=custom", "pruner._target_=mine.Mine", "sparsity=2:4", "evaluation=none", "calibration.num_samples=1"]
    # -P keeps the current folder off the path, as a console script does.
    result = subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("outputs/demo/2of4/Mine-*/result.json"))) == 1
