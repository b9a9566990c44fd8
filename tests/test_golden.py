"""Parity with what the official Wanda and SparseGPT classes, and plain magnitude, make of three linear layers.

golden/official_pruners.safetensors holds weights (O, I), inputs (4, tokens, I) and pruned weights. Case b has dead inputs
and a width that is no multiple of 128, case c fewer tokens than inputs.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file

from nnprune.patterns import NM, SparsityPattern, Unstructured, parse_pattern
from nnprune.pruners.base import Pruner
from nnprune.pruners.magnitude import Magnitude
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.pruners.wanda import Wanda

GOLDEN = load_file(Path(__file__).parent / "golden" / "official_pruners.safetensors")
PRUNERS = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}
pytestmark = pytest.mark.usefixtures("native")
CASES = [(case, method, spec) for case in "abc" for method in PRUNERS for spec in ("0.5", "0.7", "2:4", "4:8")]


@dataclass(frozen=True)
class OfficialCount(Unstructured):
    """Unstructured with the counts of the official code, which ours differ from on purpose."""

    method: str = ""

    def num_zeros(self, group_size: int) -> int:
        floor = int(group_size * self.sparsity)
        return floor if self.method == "wanda" else floor + 1  # "<= threshold" removes the threshold's own weight too


def prune(case: str, pruner: Pruner, pattern: SparsityPattern) -> torch.Tensor:
    pruner.add_linear_activations("linear", GOLDEN[f"{case}.inputs"])
    return pruner.prune_linear(GOLDEN[f"{case}.weight"], "linear", pattern)


@pytest.mark.parametrize(("case", "method", "spec"), CASES)
def test_masks_and_values_are_the_official_ones(case, method, spec):
    pattern = parse_pattern(spec)
    if isinstance(pattern, Unstructured):
        pattern = OfficialCount(pattern.sparsity, method)
    ours, official = prune(case, PRUNERS[method](), pattern), GOLDEN[f"{case}.{method}.{spec}"]
    assert torch.equal(ours != 0, official != 0)
    torch.testing.assert_close(ours, official, rtol=1e-4, atol=1e-4 * float(official.abs().max()))


@pytest.mark.parametrize(("case", "method", "spec"), CASES)
def test_our_counts_are_exact(case, method, spec):
    pattern = parse_pattern(spec)
    pruned = prune(case, PRUNERS[method](), pattern)
    rows, columns = pruned.shape
    if isinstance(pattern, NM):
        assert (pruned.unflatten(1, (-1, pattern.m)).count_nonzero(-1) <= pattern.n).all()
        return
    group = {
        "magnitude": [pruned],
        "wanda": pruned.unbind(),
        "sparsegpt": pruned.split(128, dim=1),
    }[method]
    dead = GOLDEN[f"{case}.inputs"].abs().sum((0, 1)) == 0
    for weights in group:
        expected = pattern.num_zeros(weights.numel())
        zeros = weights.numel() - int(weights.count_nonzero())
        assert zeros == expected, (rows, columns, int(dead.sum()))


def test_kept_weights_of_a_score_pruner_are_untouched():
    for method in ("magnitude", "wanda"):
        pruned, W = prune("a", PRUNERS[method](), NM(2, 4)), GOLDEN["a.weight"]
        assert torch.equal(pruned[pruned != 0], W[pruned != 0])


def test_ties_in_a_group_are_broken_as_by_the_official_code():
    """As in prune_magnitude of Wanda's repository: the smallest of each group by topk. Ties matter for quantised weights."""
    W = torch.randint(-3, 4, (64, 128), generator=torch.Generator().manual_seed(0)).float()
    for n, m in ((2, 4), (4, 8)):
        groups = W.abs().unflatten(1, (-1, m))
        mask = torch.ones_like(groups, dtype=torch.bool)
        mask.scatter_(-1, torch.topk(groups, m - n, dim=-1, largest=False)[1], False)
        pruned = Magnitude().prune_linear(W, "linear", NM(n, m))
        assert torch.equal(pruned, torch.where(mask.view_as(W), W, 0))


def test_sparsegpt_variant_of_the_nn_pruning_toolkit():
    """Mask per row in 64 columns, fixed when the first of them is reached: checked against a plain loop in float64."""
    W, X = GOLDEN["a.weight"], GOLDEN["a.inputs"].reshape(-1, 128)
    options = {"comparison_group": "row", "mask_columns": 64, "damp_inverse": True}
    for spec in ("0.5", "2:4"):
        pattern = parse_pattern(spec)
        ours = prune("a", SparseGPT(**options), pattern)
        torch.testing.assert_close(ours, plain_nn_pruning(W, X, pattern).float(), rtol=1e-3, atol=1e-5)


def plain_nn_pruning(W: torch.Tensor, X: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    """Column by column, with the whole remaining row updated after each: no blocks."""
    W, X = W.double().clone(), X.double()
    H = X.T @ X / len(X)
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
    inverse = torch.linalg.inv(H)
    inverse += 0.01 * inverse.diagonal().mean() * torch.eye(len(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    mask = torch.zeros_like(W, dtype=torch.bool)
    for j in range(W.shape[1]):
        if j % 64 == 0:
            score = (W[:, j : j + 64] / U.diagonal()[j : j + 64]) ** 2
            mask[:, j : j + 64] = pattern.mask(score)
        error = torch.where(mask[:, j], 0, W[:, j]) / U[j, j]
        W[:, j:] -= error[:, None] * U[j, j:]
    return W * mask


def test_the_copied_figures_are_the_reference():
    source = SHARED / "reference" / "official_pruners.safetensors"
    if not source.exists():
        pytest.skip(f"{source} is not on this machine; the copy in tests/golden is used as it is")
    assert (Path(__file__).parent / "golden" / source.name).read_bytes() == source.read_bytes()
