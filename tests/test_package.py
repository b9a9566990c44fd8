"""The wheel: complete without the checkout, and its console script works from any folder."""

import os
import subprocess
import sys
import zipfile

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
