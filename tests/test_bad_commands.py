"""Bad command lines: one line that names the key, the value and the remedy; errors of a user's own code name its line."""

from pathlib import Path

import pytest
from support.runs import refuse

from nnprune.model.loading import ModelSource
from nnprune.records import read_all

COMMANDS = [
    (f"label={'x' * 5000}", f"label={'x' * 190}", "no part of it longer than 200 characters"),
    ("outputs=[a]", "outputs=['a']: ", "must be one name"),
    (f"model.path={'x' * 5000}", f"model.path={'x' * 190}", "no part of it longer"),
    (f"seed={'9' * 5000}", "Exceeds the limit", "4300 digits"),
    ("sparsity=50", "sparsity=50: ", "for 50 % write 0.5"),
    ("sparsity=abc", "sparsity=abc: ", "use a fraction such as 0.5"),
    ("sparsity=50%", "sparsity=50%: ", "use a fraction such as 0.5"),
    ("sparsity=", "sparsity=: ", "use a fraction such as 0.5"),
    ("sparsity=null", "sparsity=None: ", "use a fraction such as 0.5"),
    ("sparsity=[0.5,2:4]", "sparsity=[0.5, '2:4']: ", "use a fraction such as 0.5"),
    ("sparsity=2:4:8", "sparsity=2:4:8: ", "N:M such as 2:4"),
    ("sparsity=3of4", "sparsity=3of4: ", "N:M such as 2:4"),
    ("sparsity=1", "sparsity=1: ", "0 <= sparsity < 1"),
    ("sparsity=nan", "sparsity=nan: ", "0 <= sparsity < 1"),
    ("sparsity=0.5,2:4", "sparsity=0.5,2:4: has several values", "add -m to run each"),
    ("pruner=[wanda,ria]", "pruner=[wanda,ria]: takes one option", "write -m pruner=wanda,ria"),
    ("evaluation=demo,c4", "evaluation=demo,c4: has several values", "write evaluation=[demo,c4] for a list"),
    ("pruner=wnda", "pruner=wnda: no such option", "did you mean wanda?"),
    ("-m pruner=magnitude,wnda", "pruner=wnda: no such option", "did you mean wanda?"),
    ("grid=true propagate=dense pruner=magnitude,wnda", "pruner=wnda: no such option", "did you mean wanda?"),
    ("pruner=none-such", "pruner=none-such: no such option", "there are admm, "),
    ("prunner=wanda", "prunner=wanda: no such setting", "did you mean pruner or prune?"),
    ("+prunner=wanda", "prunner=wanda: no such setting", "did you mean pruner or prune?"),
    ("calibration.num_sample=3", "calibration.num_sample=3: no such setting", "did you mean num_samples?"),
    ("calibraton.num_samples=3", "calibraton.num_samples=3: no such setting", "did you mean calibration.num_samples"),
    ("recover.epochs=4", "recover.epochs=4: no such setting", "this option of recover has none"),
    ("-m pruner=wanda,best recover.lr=1", "recover.lr=1: not all options of this sweep have it", "write ++recover.lr=1"),
    ("pruner.dampnig=1", "pruner.dampnig=1: no such setting", "did you mean damping?"),
    ("pruner=custom pruner.alpha=1", "pruner.alpha=1: no such setting", "added as +pruner.alpha="),
    ("+pruner.damping=1", "+pruner.damping=1: exists already", "leave out the +"),
    ("seed=${oc.env:NOT_SET}", "seed=${oc.env:NOT_SET}: cannot be resolved", "'NOT_SET' not found"),
    ("seed=", "seed=: ", "whole number"),
    ("sparsity.pattern=0.5", "sparsity.pattern=0.5: no such setting", "did you mean sparsity?"),
    ("wanda", "wanda: is no setting", "write key=value"),
    ("calibration.path=a(b.txt", "calibration.path=a(b.txt: is no setting", "special characters"),
]


@pytest.mark.parametrize(("arguments", "start", "remedy"), COMMANDS, ids=[row[0][:60] for row in COMMANDS])
def test_a_command_is_refused_once_in_one_line(call_main, monkeypatch, arguments, start, remedy):
    monkeypatch.setattr(ModelSource, "load", refuse)
    monkeypatch.setattr(ModelSource, "checkpoint", refuse)
    status, text = call_main(*arguments.split())
    assert status == 1
    assert text.startswith(f"Error: {start}")
    assert remedy in text
    assert "\n" not in text.strip()


def test_from_outside(run_cli, tmp_path):
    result = run_cli("sparsity=50", f"outputs={tmp_path / 'outputs'}")
    assert result.returncode == 1
    assert (result.stdout, result.stderr) == (
        "",
        "Error: sparsity=50: must be a fraction of zeros, 0 <= sparsity < 1; for 50 % write 0.5\n",
    )
    records, _ = read_all(tmp_path / "outputs")
    assert [record["status"] for record in records] == ["failed"]


USERS = """
from nnprune import ScorePruner
class Mine(ScorePruner):
    def __init__(self, kind): self.kind = kind
    def score(self, W, module_name): return {}["lost"] if self.kind == "key" else int("lost")
"""


@pytest.mark.parametrize("kind", ["key", "value"])
def test_an_error_of_a_users_own_code_names_its_line(call_main, tmp_path, monkeypatch, tiny_config, kind):
    file = tmp_path / f"my_failing_{kind}.py"
    file.write_text(USERS)
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config()
    brief = [f"{group}.{key}={cfg[group][key]}" for group in ("calibration", "evaluation") for key in ("path", "seq_len")]
    model = [f"model.path={cfg.model.path}", "model=local", "calibration=text", "evaluation=text", "calibration.num_samples=2"]
    own = ["pruner=custom", f"pruner._target_={file.stem}.Mine", f"+pruner.kind={kind}"]
    status, text = call_main("-m", "sparsity=0.5,2:4", *own, *model, *brief)
    assert status == 1
    lines = text.splitlines()
    assert len(lines) == 2, "one line a failed run"
    for line in lines:
        assert line.startswith("Error: KeyError: 'lost'" if kind == "key" else "Error: ValueError: invalid literal")
        message, _, log = line.partition("; the traceback is in ")
        assert message.endswith(f"({file}:5)")
        assert "Traceback" in Path(log).read_text()
