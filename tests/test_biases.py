"""`update.bias`: the best bias beside the best weights, whatever prunes and wherever it runs."""

import pytest
import torch
from conftest import byte_tokenizer
from support.combinations import plain_perplexity
from support.engine import IDS, engine_of, prune, prune_model, recover
from support.families import FAMILIES
from support.problems import problem
from support.ranks import on_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nnprune.check import main as check
from nnprune.engine import parallel
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.evaluation import Evaluation
from nnprune.experiment.build import build
from nnprune.experiment.identity import science
from nnprune.method import Method
from nnprune.patterns import NM, parse_pattern
from nnprune.pruners.admm import ADMM
from nnprune.pruners.alps import ALPS
from nnprune.pruners.magnitude import Magnitude
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.pruners.wanda import Wanda
from nnprune.run import run
from nnprune.solvers.layer_error import relative_error
from nnprune.statistics import CrossProduct, Hessian, InputStatistic, Means
from nnprune.targets import Asymmetric
from nnprune.updates import Refit, Update

OFFSET = 3.0


def shifted_problem(rows: int = 6, width: int = 24, tokens: int = 800) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (O, I), a bias (O,) and inputs (tokens, I) whose means are no smaller than their deviations."""
    W, X, _ = problem(rows, width, tokens)
    X = X * X.std(0).clamp_min(1e-3).reciprocal() + OFFSET * torch.linspace(-1, 1, width)
    X[:, 1] = 0
    return W, torch.linspace(-1, 1, rows), X


def accumulated(kind: type[InputStatistic], *inputs: Tensor) -> InputStatistic:
    statistic = kind()
    for part in zip(*(one.split(300) for one in inputs), strict=True):
        statistic.add(*part)
    return statistic


def with_intercept(X: Tensor, wanted: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares with an intercept, in float64: weights (O, I) that are zero outside the mask, and biases (O,)."""
    W, bias = torch.zeros(mask.shape, dtype=torch.float64), torch.zeros(len(mask), dtype=torch.float64)
    for row, kept in enumerate(mask):
        A = torch.cat([X[:, kept].double(), torch.ones(len(X), 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(A, wanted[:, row, None].double(), driver="gelsd").solution[:, 0]
        W[row, kept], bias[row] = solution[:-1], solution[-1]
    return W, bias


def test_the_error_with_a_corrected_bias_is_right_in_bfloat16_too():
    """The new bias cancels what the mean input contributes, which is most of what is rounded."""
    generator = torch.Generator().manual_seed(0)
    X = (30 + torch.randn(512, 64, generator=generator)).bfloat16().float()
    W = torch.randn(48, 64, generator=generator).bfloat16()
    pruned = W * (torch.rand(W.shape, generator=generator) < 0.5)
    shift = (W - pruned).float() @ X.mean(0)
    found = relative_error(W, pruned, X, shift=shift)
    wanted = (X.double() @ (pruned - W).double().t() + shift.double()).square().sum() / (
        X.double() @ W.double().t()
    ).square().sum()
    assert float(found) == pytest.approx(float(wanted), rel=1e-3)


def test_a_refit_with_the_bias_is_least_squares_with_an_intercept():
    W, bias, X = shifted_problem()
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, 1] = False
    method, means = Method(Magnitude(), update=Refit(1e-6, 300, damping=1e-7)), accumulated(Means, X)
    hessian = accumulated(Hessian, X).centred(means)
    refitted = method.update.update_group({"l": W * mask}, {"l": W}, hessian)["l"]
    corrected = method.corrected_bias(bias, W, refitted, means)
    wanted = X @ W.t() + bias
    best_W, best_bias = with_intercept(X, wanted, mask)
    best, found = (X.double() @ W.t() + b - wanted for W, b in ((best_W, best_bias), (refitted.double(), corrected.double())))
    assert found.square().sum() < 1.001 * best.square().sum()
    torch.testing.assert_close(corrected.double(), best_bias, rtol=1e-2, atol=1e-2)
    alone = method.update.update_group({"l": W * mask}, {"l": W}, accumulated(Hessian, X))["l"]
    assert found.square().sum() < 0.97 * (X @ (alone - W).t()).square().sum()


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_the_asymmetric_target_has_the_best_bias_for_the_blended_outputs(alpha):
    W, bias, X_dense = shifted_problem()
    noise = torch.randn(X_dense.shape, generator=torch.Generator().manual_seed(1))
    X = X_dense + 0.3 * noise + torch.linspace(1, -1, X_dense.shape[1])
    method, means = Method(Magnitude(), target=Asymmetric(alpha, damping=1e-7)), accumulated(Means, X, X_dense)
    statistics = {Hessian: accumulated(Hessian, X), CrossProduct: accumulated(CrossProduct, X, X_dense)}
    target = method.target.weights({"l": W}, {kind: one.centred(means) for kind, one in statistics.items()})["l"]
    corrected = method.corrected_bias(bias, W, target, means)
    wanted = (X + alpha * (X_dense - X)) @ W.t() + bias
    best_W, best_bias = with_intercept(X, wanted, torch.ones_like(W, dtype=torch.bool))
    torch.testing.assert_close(target.double(), best_W, rtol=0, atol=1e-2)
    torch.testing.assert_close(corrected.double(), best_bias, rtol=0, atol=3e-2)
    found = X.double() @ target.double().t() + corrected - wanted
    assert found.square().sum() < 1.001 * (X.double() @ best_W.t() + best_bias - wanted).square().sum() + 1e-3


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (Method(ALPS()), True),
        (Method(ADMM()), True),
        (Method(SparseGPT()), False),
        (Method(Wanda()), False),
        (Method(SparseGPT(), update=Refit()), True),
        (Method(Wanda(), target=Asymmetric()), True),
        (Method(ALPS(), update=Update(bias=False)), False),
        (Method(Magnitude(), update=Update(bias=True)), True),
    ],
)
def test_biases_are_corrected_where_weights_change_unless_it_is_said(method, wanted):
    assert method.corrects_biases is wanted
    assert (Means in method.statistics) is wanted


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_another_value_is_an_error(value):
    with pytest.raises(ValueError, match=r"^update.bias=.*: must be auto, true or false$"):
        Refit(bias=value)


def biased(family: str):
    """A tiny model whose biases are not zero, as those of a trained model, and whose inputs have means."""
    model = FAMILIES[family]()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.5
    return model


METHODS = {
    "magnitude": lambda bias: Method(Magnitude(), update=Update(bias=bias)),
    "wanda": lambda bias: Method(Wanda(), update=Update(bias=bias)),
    "sparsegpt": lambda bias: Method(SparseGPT(), update=Update(bias=bias)),
    "alps": lambda bias: Method(ALPS(), update=Update(bias=bias)),
    "refit": lambda bias: Method(Wanda(), update=Refit(bias=bias)),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("family", "parts"), [("opt", 6), ("qwen2", 3), ("gpt2", 4)])
def test_errors_are_never_larger_and_linears_without_bias_are_as_before(family, parts, name, tmp_path):
    (_, without), (model, reports) = (
        prune_model(tmp_path / str(bias), method=METHODS[name](bias), propagate="dense", model=biased(family))
        for bias in (False, True)
    )
    dense = biased(family).state_dict()
    for one, other in zip(without, reports, strict=True):
        assert sum("bias_change" in linear for linear in other["linears"]) == parts
        for before, after in zip(one["linears"], other["linears"], strict=True):
            if "bias_change" in after:
                assert after["bias_change"] > 0 and "bias_change" not in before
                assert after["relative_error"] < before["relative_error"] * (1.02 if name == "sparsegpt" else 1)
                found = model.state_dict()[f"{after['name']}.bias"] - dense[f"{after['name']}.bias"]
                assert float(found.norm()) == pytest.approx(after["bias_change"], rel=1e-3)
            else:
                assert after["relative_error"] == pytest.approx(before["relative_error"])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, dense[name])}
    named = {f"{linear['name']}.{part}" for report in reports for linear in report["linears"] for part in ("weight", "bias")}
    assert changed - {"lm_head.weight"} == named & dense.keys()


def test_linears_that_are_left_dense_keep_their_biases(tmp_path):
    model = biased("opt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = engine_of(model, tmp_path)
    plan = {name: parse_pattern("dense") if name.endswith("q_proj") else NM(2, 4) for name in engine.decoder.shapes()}
    prune(engine, Method(ALPS()), plan, IDS)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in before if "q_proj" in name} <= same
    assert not {name for name in before if "v_proj" in name} & same


def test_some_of_the_linears_of_an_input_have_biases(tmp_path):
    """q and k are pruned from another matrix than v, each as if it were alone."""

    def without_v():
        model = biased("qwen2")
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias = None
        return model

    methods = {True: Method(ALPS()), False: Method(ALPS(), update=Update(bias=False))}
    models = {
        bias: prune_model(tmp_path / str(bias), method=one, propagate="dense", model=without_v())
        for bias, one in methods.items()
    }
    whole, _ = prune_model(tmp_path / "all", method=methods[True], propagate="dense", model=biased("qwen2"))
    weights = {key: model.state_dict() for key, model in (("whole", whole), *((bias, one[0]) for bias, one in models.items()))}
    for name in ("q_proj", "k_proj"):
        key = f"model.layers.0.self_attn.{name}.weight"
        torch.testing.assert_close(weights[True][key], weights["whole"][key])
        assert not torch.allclose(weights[True][key], weights[False][key])
    key = "model.layers.0.self_attn.v_proj.weight"
    torch.testing.assert_close(weights[True][key], weights[False][key])


@pytest.mark.parametrize(
    "options", [("pruner=alps",), ("pruner=wanda", "update.bias=true"), ("pruner=best_fast",)], ids=" ".join
)
@torch.no_grad()
def test_the_saved_model_has_the_biases_that_were_measured(options, tiny_config, tiny_model_dir, capsys):
    cfg = tiny_config(*options, "save=true", "runtime=low_memory", "model.dtype=float32")
    record, path = run(cfg), build(cfg).folder / "model"
    saved, dense = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (path, tiny_model_dir))
    for linear in record.per_linear:
        before, after = (model.get_parameter(f"{linear['name']}.bias") for model in (dense, saved))
        assert float((after - before).norm()) == pytest.approx(linear["bias_change"], rel=1e-3)
    assert check([str(path)]) == 0, capsys.readouterr().out
    ids = Evaluation({}, 32, 5, cfg.evaluation.path).token_ids(AutoTokenizer.from_pretrained(path))["text"]
    assert plain_perplexity(saved, ids) == pytest.approx(record.metrics["text_perplexity"], rel=1e-4)
    saved.get_parameter("model.decoder.layers.1.fc2.bias").zero_()
    assert plain_perplexity(saved, ids) != pytest.approx(record.metrics["text_perplexity"], rel=1e-4)


def test_cells_of_a_grid_start_from_the_dense_biases(tmp_path):
    methods = {"wanda": METHODS["wanda"](True), "alps": METHODS["alps"](True), "plain": METHODS["wanda"](False)}
    engine = engine_of(biased("qwen2"), tmp_path)
    plan = dict.fromkeys(engine.decoder.shapes(), NM(2, 4))
    files = {name: LayerFiles(tmp_path / name, engine.decoder.path) for name in methods}
    PruningPass(engine, [PruneTask(method, plan, files[name]) for name, method in methods.items()], "dense").run(IDS)
    for name, method in methods.items():
        alone, _ = prune_model(tmp_path / f"{name}-alone", method=method, propagate="dense", model=biased("qwen2"))
        for index, layer in enumerate(alone.model.layers):
            torch.testing.assert_close(files[name].read(index), dict(layer.state_dict()))


def prune_opt(folder, recovers):
    """Write the state of this rank's model."""
    model = biased("opt")
    engine = engine_of(model, folder / str(parallel.rank()))
    method = Method(Wanda(), update=Update(bias=True), **({"recovery": recover(0, 1)} if recovers else {}))
    prune(engine, method, dict.fromkeys(engine.decoder.shapes(), NM(2, 4)), IDS)
    torch.save(model.state_dict(), folder / f"{parallel.rank()}.pt")


@pytest.mark.parametrize("recovers", [False, True])
def test_processes_find_the_biases_of_one(recovers, tmp_path):
    (tmp_path / "one").mkdir()
    prune_opt(tmp_path / "one", recovers)
    assert on_ranks(prune_opt, tmp_path, recovers) == [0, 0]
    expected, first, second = (torch.load(tmp_path / file) for file in ("one/0.pt", "0.pt", "1.pt"))
    dense = biased("opt").state_dict()
    for name in (name for name in expected if name.endswith("bias") and "norm" not in name):
        assert torch.equal(first[name], second[name]), name
        assert recovers or torch.allclose(first[name], expected[name], rtol=0, atol=1e-3), name
        assert not torch.allclose(first[name], dense[name], rtol=0, atol=5e-3) or "layers" not in name


def test_fingerprints_tell_what_was_done_to_biases(tiny_config, tmp_path_factory):
    def of(*options: str) -> str:
        return build(tiny_config(*options)).fingerprint

    assert len({of("pruner=alps"), of("pruner=alps", "update.bias=false")}) == 2
    assert of("pruner=alps") == of("pruner=alps", "update.bias=true")
    assert of("pruner=sparsegpt") == of("pruner=sparsegpt", "update.bias=false") != of("pruner=sparsegpt", "update.bias=true")
    path = tmp_path_factory.mktemp("models") / "llama"
    FAMILIES["llama"]().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    without = {of("pruner=alps", f"model.path={path}", f"update.bias={value}") for value in ("auto", "true", "false")}
    assert len(without) == 1
    assert "bias" not in science(build(tiny_config("pruner=alps", f"model.path={path}")))["update"]  # as in earlier records
