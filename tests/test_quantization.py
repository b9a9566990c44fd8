"""Kept weights on a grid: rounded in SparseGPT's sweep or afterwards, saved so that levels and scales can be had exactly."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.problems import error, problem, prune
from support.runs import kill, run_until_killed
from transformers import AutoModelForCausalLM

import nnprune.model.checkpoint
from nnprune import check
from nnprune.experiment.build import build
from nnprune.model.scales import SCALES
from nnprune.patterns import NM, Unstructured, parse_pattern
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.pruners.wanda import Wanda
from nnprune.run import run
from nnprune.solvers.quantization import SHRINK, Quantization
from nnprune.statistics import Hessian
from nnprune.updates import Round


def literal_scale(weights, deviations, bits):
    """Of one group of one output, number by number."""
    most, best = 2 ** (bits - 1) - 1, (math.inf, 1.0)
    for factor in SHRINK:
        fraction, exponent = math.frexp(max(map(abs, weights)) * factor / most)
        scale = max(math.ldexp(math.ceil(fraction * 2 ** (9 - bits)), exponent - 9 + bits), 2.0 ** (-16 - bits))
        loss = sum(((literal_round(w, scale, most) - w) / d) ** 2 for w, d in zip(weights, deviations, strict=True))
        best = min(best, (loss, scale), key=lambda pair: pair[0])
    return best[1]


def literal_round(weight, scale, most):
    return scale * max(-most, min(most, round(weight / scale)))


def literal_sweep(W, U, pattern, start, stop, scales=None, most=0):
    """W (O, I) and U, float64, with columns from `start` to `stop` pruned, one after the other; all later ones absorb each error."""
    W, drop = W.clone(), torch.zeros_like(W, dtype=torch.bool)
    slab = pattern.m if isinstance(pattern, NM) else stop - start
    for j in range(start, stop):
        if (j - start) % slab == 0:
            columns = slice(j, min(j + slab, stop))
            cost = (W[:, columns] / U.diagonal()[columns]) ** 2
            drop[:, columns] = ~pattern.mask(cost, per="matrix")
        for row in range(len(W)):
            kept = 0.0 if drop[row, j] else float(W[row, j])
            if scales is not None:
                kept = literal_round(kept, float(scales[row, j]), most)
            W[row, j:] -= (W[row, j] - kept) / U[j, j] * U[j, j:]
            W[row, j] = kept
    return W


def literal_sparsegpt(W, statistic, pattern, bits, group_size, block):
    hessian = statistic.mean().double()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    W = W.double().masked_fill(dead, 0)
    for start in range(0, W.shape[1], block):
        stop = min(start + block, W.shape[1])
        only_pruned, scales = literal_sweep(W, U, pattern, start, stop), torch.zeros_like(W)
        for row, first in itertools.product(range(len(W)), range(start, stop, group_size)):
            group = slice(first, min(first + group_size, stop))
            scales[row, group] = literal_scale(only_pruned[row, group].tolist(), U.diagonal()[group].tolist(), bits)
        W = literal_sweep(W, U, pattern, start, stop, scales, 2 ** (bits - 1) - 1)
    return W


@pytest.mark.parametrize(
    ("spec", "bits", "group_size", "block_size", "block"),
    [("2:4", 4, 16, 32, 32), ("2:4", 3, 16, 8, 16), ("1:3", 4, 8, 16, 24), ("0.5", 4, 20, 16, 20), ("0.5", 8, 4, 16, 16)],
)
def test_sparsegpt_is_the_paper_s_sweep(spec, bits, group_size, block_size, block, native, device):
    W, _, statistic = problem(6, 48, 400)
    W = W / 50
    expected = literal_sparsegpt(W, statistic, parse_pattern(spec), bits, group_size, block)
    pruner = SparseGPT(block_size, bits=bits, group_size=group_size)
    statistic._sum = statistic._sum.to(device)
    pruner.statistics["l"] = statistic
    found = pruner.prune_linear(W.to(device), "l", parse_pattern(spec)).cpu().double()
    assert ((found - expected).abs() > 1e-6).double().mean() < 0.01  # a value between two levels may go either way
    assert expected.count_nonzero() > W.numel() / 4


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [1e-6, 3e-3, 40])
def test_products_are_exact_and_levels_come_back(bits, size):
    grid = Quantization(bits, 24)
    W, *_ = problem(9, 64, 8, seed=bits)
    W = W * size * (torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    W[2] = 0
    W[3, :24] = W[3, 0].sign() * size
    rounded = grid.round_all(W)
    for dtype in (torch.bfloat16, torch.float16):
        stored = rounded.to(dtype)
        assert torch.equal(stored.float(), rounded)
        scales = grid.scales_of(stored)
        assert scales.shape == (9, 3) and scales.dtype == dtype and (scales > 0).all()
        levels = grid.levels(stored, scales)
        assert levels.abs().max() <= 2 ** (bits - 1) - 1
        product = levels.double() * scales.double().repeat_interleave(24, 1)[:, :64]
        assert torch.equal(product, stored.double())
        assert not levels[W == 0].any()


def test_what_is_on_no_grid_is_refused():
    W, *_ = problem(9, 64, 8)
    grid = Quantization(4, 32)
    with pytest.raises(ValueError, match="are on no grid of 4 bits with a scale for 32 inputs"):
        grid.scales_of(W)
    rounded = grid.round_all(W)
    scales = grid.scales_of(rounded)
    rounded[0, 0] *= 1.01
    with pytest.raises(ValueError, match="1 weights are no level of 4 bits"):
        grid.levels(rounded, scales)


def test_the_search_for_a_scale_pays():
    W, *_ = problem(64, 128, 8)
    largest = W.abs().amax(1, keepdim=True) / 7
    plain = (W / largest).round() * largest
    assert (Round().update_group({"l": W}, {}, None)["l"] - W).square().sum() < 0.9 * (plain - W).square().sum()


@pytest.mark.parametrize("spec", ["2:4", "0.5"])
def test_rounding_in_the_sweep_beats_rounding_afterwards(spec, native):
    W, X, _ = problem(64, 256, 2000)
    found = {
        "joint": prune(SparseGPT(bits=4), W, X, spec),
        "then": Round(4).update_group({"l": prune(SparseGPT(), W, X, spec)}, {}, None)["l"],
    }
    for rounded in found.values():
        parse_pattern(spec).check(rounded)
        Quantization(4, 128).scales_of(rounded)
    pruned = error(W, prune(SparseGPT(), W, X, spec), X).sum()
    losses = {name: float(error(W, rounded, X).sum() / pruned) - 1 for name, rounded in found.items()}
    assert 0 < losses["joint"] < 0.7 * losses["then"]


def test_without_bits_nothing_is_new():
    """A fingerprint may be of all attributes, and those of earlier records lack bits."""
    assert vars(SparseGPT()).keys() == {"block_size", "damping", "comparison_group", "mask_columns", "damp_inverse"}
    assert SparseGPT().quantization is None
    assert SparseGPT(bits=3).quantization == Quantization(3, 128)


@pytest.fixture(scope="module")
def bfloat16_model(tiny_model_dir, tmp_path_factory):
    """The tiny model as most are stored."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bfloat16"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(folder)
    for path in tiny_model_dir.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("settings", "bits", "group_size", "bits_per_weight"),
    [
        (("pruner=sparsegpt_int4", "sparsity=2:4"), 4, 128, 3 + 16 / 32),
        (("pruner=wanda", "update=round", "update.bits=3", "update.group_size=16", "sparsity=0.75"), 3, 16, 1.75 + 1),
    ],
)
def test_a_saved_model_is_on_the_grid(settings, bits, group_size, bits_per_weight, tiny_config, bfloat16_model, capsys):
    cfg = tiny_config(f"model.path={bfloat16_model}", "save=true", "prune.include=*.k_proj", *settings)
    record = run(cfg)
    assert record.quantization == {"bits": bits, "group_size": group_size, "bits_per_weight": pytest.approx(bits_per_weight)}
    saved = build(cfg).folder / "model"
    model, scales = AutoModelForCausalLM.from_pretrained(saved, dtype="auto"), load_file(saved / SCALES)
    assert scales.keys() == {linear["name"] for linear in record.per_linear} and len(scales) == 2
    for name, scale in scales.items():
        weight = model.get_submodule(name).weight.detach()
        assert weight.dtype == scale.dtype == torch.bfloat16
        levels = weight.double() / scale.double().repeat_interleave(group_size, 1)[:, :32]
        assert torch.equal(levels, levels.round()) and levels.abs().max() <= 2 ** (bits - 1) - 1
        parse_pattern(record.sparsity).check(weight)
    summary = json.loads((saved / "pruning.json").read_text())
    assert summary["quantization"] == record.quantization
    assert f"{bits} bits with a scale for {group_size} inputs" in (saved / "README.md").read_text()
    assert check.main([str(saved)]) == 0
    name, scale = next(iter(scales.items()))
    save_file({**scales, name: scale * 1.25}, saved / SCALES)
    assert check.main([str(saved)]) == 1
    assert f"grid      FAULT  {name}: " in capsys.readouterr().out


def test_a_killed_run_keeps_its_grid(tiny_config, tmp_path, monkeypatch):
    settings = ("pruner=sparsegpt_int4", "sparsity=2:4", "save=true")
    whole = tiny_config(*settings, f"outputs={tmp_path / 'whole'}")
    record = run(whole)
    cfg, calls = tiny_config(*settings), itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(
            nnprune.model.checkpoint,
            "save_file",
            lambda *args, **more: kill() if next(calls) == 2 else save_file(*args, **more),
        )
        run_until_killed(cfg)
    assert len(list(tmp_path.glob("outputs/**/unfinished/layer-*.safetensors"))) == 1
    assert run(cfg).metrics == record.metrics
    found, expected = (load_file(build(one).folder / "model" / SCALES) for one in (cfg, whole))
    assert found.keys() == expected.keys() and len(found) == 12
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert check.main([str(build(cfg).folder / "model")]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("pruner=sparsegpt_int4", "update=refit"), "update._target_=nnprune.updates.Refit: changes what pruner.bits=4"),
        (("pruner=sparsegpt_int4", "update=round"), "update._target_=nnprune.updates.Round: changes what pruner.bits=4"),
        (("pruner=sparsegpt_int4", "recover=layer"), "recover.epochs_after=4: changes what pruner.bits=4"),
        (("pruner=alps", "update=round", "recover=layer"), "recover.epochs_after=4: changes what update.bits=4"),
        (("pruner=alps", "+pruner.bits=4"), "pruner.bits=4: no such setting (~pruner.bits leaves out a preset's); "),
        (("pruner=sparsegpt_int4", "pruner.bits=9"), "pruner.bits=9: must be a whole number, at least 2 and at most 8"),
        (("pruner=sparsegpt_int4", "pruner.bits=1"), "pruner.bits=1: must be"),
        (("update=round", "update.bits=null"), "update.bits=None: must be"),
        (("update=round", "update.group_size=0"), "update.group_size=0: must be"),
        (("pruner=sparsegpt_int4", "pruner.bits=null", "pruner.group_size=64"), "pruner.group_size=64: has no effect"),
    ],
)
def test_what_contradicts_is_refused(settings, message, tiny_config):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        build(tiny_config(*settings))
    assert str(refused.value).startswith(message)


def test_what_tunes_before_pruning_is_allowed(tiny_config):
    assert build(tiny_config("pruner=sparsegpt_int4", "recover=next_layer")).method.quantization == Quantization(4, 128)


def test_a_dead_input_has_no_say(native):
    W, X, _ = problem(8, 64, 300)
    pruner = SparseGPT(bits=4)
    pruner.statistics["l"] = Hessian()
    pruner.statistics["l"].add(torch.zeros_like(X))
    assert not pruner.prune_linear(W, "l", Unstructured(0.5)).any()
    assert Wanda().quantization is None
