"""The classes of docs/pruner.md and the README, run as they stand, and a class of the nn-pruning toolkit, run unchanged."""

import math
import re

import pytest
import torch
from conftest import ROOT

import nnprune
from nnprune import BaseActAwareUnstructuredPruner
from nnprune.patterns import NM
from nnprune.pruners.magnitude import Magnitude
from nnprune.texts import DEMO_FOLDER

FENCES = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
README = FENCES.findall((ROOT / "README.md").read_text(encoding="utf-8"))
DOCUMENT = FENCES.findall((ROOT / "docs" / "pruner.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Settings of a run of a second, on the first characters of the demo's texts: tokenising all of them would take longer."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("calibration", "test"):
        (folder / f"{name}.txt").write_text((DEMO_FOLDER / f"{name}.txt").read_text(encoding="utf-8")[:8000], encoding="utf-8")
    calibration = [f"calibration.path={folder / 'calibration.txt'}", "calibration.num_samples=4", "calibration.seq_len=64"]
    evaluation = [f"evaluation.datasets.demo.path={folder / 'test.txt'}", "evaluation.seq_len=64", "evaluation.max_windows=4"]
    return [*calibration, *evaluation, "runtime.device=cpu"]


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    """A folder with the document's classes in my_pruner.py."""
    python = [code for language, code in DOCUMENT if language == "python" and "class " in code]
    assert len(python) == 3
    (tmp_path / "my_pruner.py").write_text("\n\n".join(python), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_readmes_command_runs_from_a_users_folder(run_cli, tmp_path, small):
    [python] = [code for language, code in README if language == "python"]
    (tmp_path / "my_pruner.py").write_text(python, encoding="utf-8")
    [command] = {
        line for _, code in README + DOCUMENT for line in code.splitlines() if "nnprune.run" in line and "my_pruner" in line
    }
    assert "pruner=custom pruner._target_=my_pruner.MyPruner +pruner.alpha=0.7" in command
    arguments = command.split("nnprune.run ")[1].split()
    result = run_cli(*arguments, *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    [path] = tmp_path.glob("outputs/demo/*/MyPruner-*/result.json")
    assert '"alpha": 0.7' in path.read_text()


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_the_documents_classes_run_from_python(users_folder, sparsity, small):
    import my_pruner

    settings = [*small, f"outputs={users_folder / 'records'}"]
    found = [value for value in vars(my_pruner).values() if isinstance(value, type) and value.__module__ == "my_pruner"]
    assert len(found) == 4
    perplexities = set()
    for kind in found:
        record = nnprune.prune(pruner=kind(), model_name="demo", sparsity=sparsity, overrides=settings)
        assert record.status == "completed"
        assert record.linear_sparsity == pytest.approx(0.5, abs=1e-3)
        assert record.pruner == kind.__name__
        perplexities.add(record.metrics["demo_perplexity"])
    assert len(perplexities) > 1


def test_the_documents_python_snippet(users_folder, small):
    [snippet] = [code for language, code in DOCUMENT if language == "python" and "nnprune.prune(" in code]
    quick = snippet.replace("sparsity=", f"overrides={small!r}, sparsity=")
    assert quick != snippet
    namespace = {}
    exec(quick, namespace)
    assert namespace["record"].metrics["demo_perplexity"] > 1


def test_editing_a_custom_pruner_makes_another_experiment(users_folder, small):
    import importlib

    import my_pruner

    first = nnprune.prune(pruner=my_pruner.MyPruner(), overrides=small)
    with (users_folder / "my_pruner.py").open("a") as file:
        file.write("\n# edited\n")
    importlib.reload(my_pruner)
    second = nnprune.prune(pruner=my_pruner.MyPruner(), overrides=small)
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("sparsity=2:4", "write prune(..., sparsity="),
        ("pruner=wanda", "give the pruner object its options"),
        ("+pruner.alpha=7", "give the pruner object its options"),
        ("~pruner.alpha", "give the pruner object its options"),
        ("grid=true", "call prune once for each pruner and sparsity"),
        ("plan=true", "only the command nnprune estimates"),
        ("experiment=readme_table", "start it with the command nnprune"),
        ("model=opt-125m", "leave out this override or model_name"),
        ("model.path=elsewhere", "leave out this override or model_name"),
    ],
)
def test_an_override_that_would_not_count_is_refused(override, remedy, tiny_model_dir):
    with pytest.raises(ValueError, match=re.escape(remedy)) as error:
        nnprune.prune(ToolkitPruner(), str(tiny_model_dir), overrides=["seed=1", override])
    assert str(error.value).startswith(f"{override}: ")


class ToolkitPruner(BaseActAwareUnstructuredPruner):
    """In the ways of the toolkit we start from: no super().__init__(), works in place, returns more zeros than asked for."""

    def __init__(self):
        self.squares = {}

    def add_linear_activations(self, module_name, X):
        assert X.ndim == 3
        flat = X.reshape(-1, X.shape[-1]).float()
        total = (flat * flat).sum(dim=0).cpu()
        if module_name in self.squares:
            self.squares[module_name].add_(total)
        else:
            self.squares[module_name] = total

    def clear_linear_activations(self, module_name):
        del self.squares[module_name]

    def prune_linear_unstruct(self, W, module_name, k):
        scores = W.abs().float() * self.squares[module_name].sqrt_()
        per_row = math.ceil(k / W.shape[0])
        W.scatter_(1, scores.topk(per_row, dim=1, largest=False).indices, 0)
        return W

    def prune_linear_nm(self, W, module_name, n, m):
        scores = (W.abs().float() * self.squares[module_name].sqrt_()).reshape(len(W), -1, m)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(n, dim=-1).indices, True)
        return W * mask.reshape(W.shape)


@pytest.mark.parametrize("sparsity", [0.3, "2:4"])
def test_a_class_of_the_starting_toolkit_is_wanda_here_too(sparsity, tmp_path, small):
    from nnprune.pruners.wanda import Wanda

    settings = [*small, f"outputs={tmp_path}"]
    pruner = ToolkitPruner()
    theirs = nnprune.prune(pruner=pruner, sparsity=sparsity, overrides=settings)
    ours = nnprune.prune(pruner=Wanda(), sparsity=sparsity, overrides=settings)
    assert theirs.metrics["demo_perplexity"] == pytest.approx(ours.metrics["demo_perplexity"], rel=1e-3)
    assert not pruner.squares


class Broken(nnprune.Pruner):
    def __init__(self, answer):
        self._answer = answer

    def prune_linear(self, W, module_name, pattern):
        return self._answer(W)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda W: W, "has .* zeros, fewer than"),
        (lambda W: None, "returned NoneType"),
        (lambda W: W[:1], r"returned \(1, 192\)|returned \(1, "),
        (lambda W: W * torch.nan, "NaN or infinite weights"),
    ],
)
def test_a_pruner_that_breaks_the_contract_is_named(answer, complaint, tmp_path, small):
    with pytest.raises(ValueError, match=complaint) as error:
        nnprune.prune(pruner=Broken(answer), overrides=[*small, f"outputs={tmp_path}"])
    assert "layers.0" in str(error.value)
    assert "Broken" in str(error.value)


def test_the_documents_diff_is_a_pruner():
    """What the diff of docs/pruner.md adds; tests/test_contract.py would find it in conf/pruner/."""
    [diff] = [code for language, code in DOCUMENT if language == "diff"]
    added = diff.rpartition("@@\n")[2]
    namespace = {}
    exec("\n".join(line[1:] for line in added.splitlines()), namespace)
    pruner = namespace["STADE"]()
    W, X = torch.randn(8, 32), torch.randn(2, 50, 32) + 1
    X[..., 3] = 7  # loud, but it never changes
    pruner.add_linear_activations("l", X)
    pruned = pruner.prune_linear(W, "l", NM(2, 4))
    assert (pruned != 0).unflatten(1, (-1, 4)).sum(-1).eq(2).all()
    assert not pruned[:, 3].any()


@pytest.mark.parametrize("pruner", ["wanda", Magnitude])
def test_what_is_no_pruner_object_is_refused(pruner):
    with pytest.raises(ValueError, match=r"^pruner=.*: must be an object, such as nnprune\.pruners\.wanda\.Wanda\(\)"):
        nnprune.prune(pruner)
