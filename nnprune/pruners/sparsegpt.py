"""SparseGPT: prune column by column, later columns absorb the error (Frantar & Alistarh 2023, arXiv:2301.00774).

Minimises ||(W - W0) X||^2 for each row. With H = E[x x^T] + damping and H^-1 = U^T U (U upper triangular), removing w_j costs
(w_j / U_jj)^2, and the optimal update of the columns after j is  W[:, j:] -= (w_j - q_j) / U_jj * U[j, j:].
Earlier columns are final, because U is triangular: no step needs a new inverse. With `bits`, q_j is a kept weight rounded to a grid, and
later columns absorb that error too (section 3.5).

Letters: O output features, I input features, C columns of a block. Weights are held transposed, (I, O), so that a
column of W is contiguous.
"""

import math

import torch
from torch import Tensor

from nnprune.checks import check_count, check_positive, quoted
from nnprune.kernels import sweep, sweep_triton
from nnprune.patterns import NM, SparsityPattern
from nnprune.pruners.stacked import StackedPruner
from nnprune.solvers.cholesky import cholesky_, factor_of_inverse
from nnprune.solvers.quantization import Quantization
from nnprune.statistics import InputStatistic

NUM_RETRIES = 2  # with ten times the damping, after a failed factorisation
MAX_BLOCK_SIZE = 1 << 20  # no linear has so many inputs
SUB_BLOCK = 16  # columns of a block whose errors are applied to the block's later columns in one product


class SparseGPT(StackedPruner):
    """The official algorithm by default; the options reproduce variants of its mask.

    Dead inputs lose their weights, as in the official code. Raises ValueError for a setting out of range or settings that contradict
    each other; in `prune_stack` for a hessian that cannot be factorised.

    Args:
        block_size: columns whose updates to the rest of the matrix are accumulated into one product.
        damping: fraction of the mean diagonal that is added to the diagonal of the hessian.
        comparison_group: "block": unstructured scores are compared over all rows of a slab; "row": within each row.
        mask_columns: columns of a slab. The mask of a slab is chosen when its first column is reached.
            None: the block (unstructured), or one group of M (N:M).
        damp_inverse: also damp the inverse hessian before it is factorised.
        bits: kept weights are rounded to a grid of so many bits. None: they are not.
        group_size: consecutive inputs that share a scale. The scales of a block are chosen when its first column is reached, for what
            its weights would be if they were only pruned: at 2:4, kept weights grow by what they absorb. No group lies across two
            blocks, so a block has at least group_size columns.
    """

    corrects_biases = False  # as published, and as the tables that it is compared with
    matrix_copies, weight_copies = 2, 2
    bits: int | None = None

    def __init__(
        self,
        block_size: int = 128,
        damping: float = 0.01,
        comparison_group: str = "block",
        mask_columns: int | None = None,
        damp_inverse: bool = False,
        bits: int | None = None,
        group_size: int = 128,
    ) -> None:
        if comparison_group not in ("block", "row"):
            raise ValueError(f"pruner.comparison_group={quoted(comparison_group)}: must be block or row")
        self.block_size = check_count("pruner.block_size", block_size, 1, MAX_BLOCK_SIZE)
        if not isinstance(damp_inverse, bool):
            raise ValueError(f"pruner.damp_inverse={quoted(damp_inverse)}: must be true or false")
        if mask_columns is not None:
            check_count("pruner.mask_columns", mask_columns, 1)
            if block_size % mask_columns:
                raise ValueError(f"pruner.mask_columns={mask_columns}: must divide pruner.block_size={block_size}")
        self.damping = check_positive("pruner.damping", damping)
        self.comparison_group = comparison_group
        self.mask_columns = mask_columns
        self.damp_inverse = damp_inverse
        if bits is not None:  # otherwise it has no such attributes, as before there were any: a fingerprint may be of all
            Quantization.checked("pruner", bits, group_size)
            self.bits, self.group_size = bits, group_size
        elif group_size != 128:
            raise ValueError(f"pruner.group_size={quoted(group_size)}: has no effect without pruner.bits; set pruner.bits=4")

    @property
    def quantization(self) -> Quantization | None:
        return Quantization(self.bits, self.group_size) if self.bits else None

    def validate(self, pattern: SparsityPattern) -> None:
        if isinstance(pattern, NM) and (self.mask_columns or 0) % pattern.m:
            raise ValueError(
                f"pruner.mask_columns={self.mask_columns}: must be a multiple of {pattern.m} for sparsity {pattern}, or null"
            )

    def prune_stack(self, weight_IO: Tensor, sizes: list[int], pattern: SparsityPattern, names: list[str]) -> Tensor:
        statistic = self.statistics[names[0]]
        key = (self.damping, self.damp_inverse)
        U, dead, damping = statistic.memo(key, lambda: self._factorise(statistic, names[0]))
        if damping != self.damping:
            self.notes.update({name: {"damping": damping} for name in names})
        weight_IO.masked_fill_(dead[:, None], 0)
        unit = math.lcm(pattern.m if isinstance(pattern, NM) else 1, self.group_size if self.bits else 1)
        block_size = max(self.block_size // unit, 1) * unit  # no group may lie across two blocks
        for start in range(0, len(weight_IO), block_size):
            stop = min(start + block_size, len(weight_IO))
            block = (weight_IO[start:stop], U[start:stop, start:stop], pattern, sizes)
            errors_CO = self._prune_block(*block, self._scales(*block) if self.bits else None)
            weight_IO[stop:].addmm_(U[start:stop, stop:].t(), errors_CO, alpha=-1)
        return weight_IO

    def _prune_block(
        self, weight_CO: Tensor, U_CC: Tensor, pattern: SparsityPattern, sizes: list[int], scale_CO: Tensor | None = None
    ) -> Tensor:
        """Prune one column block in place; returns the errors (C, O) to apply to the columns after the block.

        Within the block, errors are accumulated once more over sub-blocks: a column then takes three operations on a few rows of
        memory, and one product for each sub-block updates the rest of the block.
        """
        num_columns = len(weight_CO)
        slab = self.mask_columns or (pattern.m if isinstance(pattern, NM) else num_columns)
        kernels = sweep_triton if weight_CO.is_cuda else sweep
        grid = () if scale_CO is None else (scale_CO, self.quantization.most)
        does_round = kernels is sweep or not grid
        if does_round and kernels.available() and num_columns <= kernels.MAX_COLUMNS:  # the same in one call
            if isinstance(pattern, NM) and slab == pattern.m <= kernels.MAX_M:
                return kernels.prune_block_nm(weight_CO, U_CC, pattern.n, pattern.m, *grid)
            if slab >= num_columns:
                drop_CO = self._drop(weight_CO, U_CC.diagonal(), pattern, sizes)
                return kernels.prune_block_masked(weight_CO, U_CC, drop_CO, *grid)
        width = _sub_block_width(slab, num_columns)
        drop_CO = torch.empty_like(weight_CO, dtype=torch.bool)
        errors_CO = torch.empty_like(weight_CO)
        diagonal = U_CC.diagonal()
        for start in range(0, num_columns, width):
            stop = min(start + width, num_columns)
            for j in range(start, stop):
                if j % slab == 0:
                    columns = slice(j, min(j + slab, num_columns))
                    drop_CO[columns] = self._drop(weight_CO[columns], diagonal[columns], pattern, sizes)
                kept_O = weight_CO[j] * ~drop_CO[j]
                if scale_CO is not None:
                    kept_O = self.quantization.round(kept_O, scale_CO[j])
                torch.sub(weight_CO[j], kept_O, out=errors_CO[j]).div_(diagonal[j])
                weight_CO[j] = kept_O
                weight_CO[j + 1 : stop].addr_(U_CC[j, j + 1 : stop], errors_CO[j], alpha=-1)
            weight_CO[stop:].addmm_(U_CC[start:stop, stop:].t(), errors_CO[start:stop], alpha=-1)
        return errors_CO

    def _scales(self, weight_CO: Tensor, U_CC: Tensor, pattern: SparsityPattern, sizes: list[int]) -> Tensor:
        """The scale (C, O) of each weight of a block: the best for what the block would be if it were only pruned."""
        pruned_CO = weight_CO.clone()
        self._prune_block(pruned_CO, U_CC, pattern, sizes)
        groups = zip(pruned_CO.split(self.group_size), U_CC.diagonal().split(self.group_size), strict=True)
        return torch.cat(
            [self.quantization.scale(weight_GO, deviation_G).expand_as(weight_GO) for weight_GO, deviation_G in groups]
        )

    def _drop(self, weight_CO: Tensor, diagonal_C: Tensor, pattern: SparsityPattern, sizes: list[int]) -> Tensor:
        """The weights (C, O) of a slab to remove: those of lowest cost (w_j / U_jj)^2. Linears are not compared with each other."""
        cost_OC = (weight_CO / diagonal_C[:, None]).square_().t().contiguous()
        if isinstance(pattern, NM) or self.comparison_group == "row":
            return ~pattern.mask(cost_OC).t()
        return ~torch.cat([pattern.mask(cost, per="matrix") for cost in cost_OC.split(sizes)]).t()

    def _factorise(self, statistic: InputStatistic, module_name: str) -> tuple[Tensor, Tensor, float]:
        """U (I, I), upper triangular with H^-1 = U^T U, the dead inputs (I,), bool, and the damping that worked."""
        damping = self.damping
        for _ in range(1 + NUM_RETRIES):
            hessian = statistic.mean()
            dead = hessian.diagonal() == 0
            hessian.diagonal().masked_fill_(dead, 1)
            hessian.diagonal().add_(damping * hessian.diagonal().mean())
            U, failed = factor_of_inverse(hessian)
            if not failed and self.damp_inverse:
                inverse = U.t() @ U
                inverse.diagonal().add_(damping * inverse.diagonal().mean())
                U, failed = cholesky_(inverse, upper=True)
            if not failed:
                return U, dead, damping
            damping *= 10
        raise ValueError(
            f"{module_name}: its hessian from {statistic.num_tokens} tokens could not be factorised, even with damping "
            f"{damping / 10:g}; raise pruner.damping or calibration.num_samples"
        )


def _sub_block_width(slab: int, num_columns: int) -> int:
    """Columns of a sub-block, about SUB_BLOCK. All earlier errors must be applied where a slab begins."""
    if slab >= num_columns:
        return SUB_BLOCK
    return SUB_BLOCK // slab * slab if slab <= SUB_BLOCK else math.gcd(slab, SUB_BLOCK)
