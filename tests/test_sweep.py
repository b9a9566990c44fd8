"""The kernels against the sweep as the paper writes it: in C, in Triton by its interpreter and, where there is one, on a CUDA device."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nnprune.kernels import sweep, sweep_triton
from nnprune.kernels.library import library
from nnprune.patterns import NM, Unstructured

needs_triton = pytest.mark.skipif(sweep_triton.triton is None, reason="Triton is not installed")

# The last block of a matrix is narrower; 7 and 33 output features fill no tile; 15 and 12 of 16 columns are whole groups of 5, 12.
MASKED = [(128, 7), (100, 33), (64, 96), (17, 1), (8, 96), (1, 1)]
N_OF_M = [
    *((128, 7, 2, 4), (64, 96, 4, 8), (64, 1, 1, 2), (100, 7, 3, 5), (16, 96, 1, 4), (4, 1, 2, 4)),
    *((36, 7, 7, 12), (48, 1, 8, 16), (40, 7, 5, 20)),
]


def load_again() -> ModuleType:
    """A second copy of the module: a kernel takes from the environment of its definition whether it is interpreted."""
    spec = importlib.util.spec_from_file_location("sparsegpt_triton_again", sweep_triton.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["native", "interpreted", "cuda"])
def kernel(request: pytest.FixtureRequest) -> tuple[ModuleType, str]:
    """The module, and the device it prunes on."""
    if request.param == "native":
        if library() is None:
            pytest.skip("this machine compiles no C")
        return sweep, "cpu"
    if sweep_triton.triton is None:
        pytest.skip("Triton is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1" if request.param == "interpreted" else "0")
        module = load_again()
        assert module.available()
        return module, "cuda" if request.param == "cuda" else "cpu"


def block(num_columns: int, num_outputs: int, by_column: bool = False) -> tuple[Tensor, Tensor]:
    """Weights (C, O) of a block and its part (C, C) of a larger U, a view, stored by rows or by columns."""
    generator = torch.Generator().manual_seed(num_columns)
    width = num_columns + 5
    X = torch.randn(3 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    hessian = X.T @ X / X.square().mean() / len(X) + 0.1 * torch.eye(width)
    U = torch.linalg.cholesky(hessian.inverse(), upper=True)
    U = U.t().contiguous().t() if by_column else U.contiguous()
    return torch.randn(num_columns, num_outputs, generator=generator), U[2 : 2 + num_columns, 2 : 2 + num_columns]


def costs(weight_CO: Tensor, U_CC: Tensor) -> Tensor:
    """(w_j / U_jj)^2 (O, C): what removing a weight costs."""
    return (weight_CO / U_CC.diagonal()[:, None]).square().t()


def plain_sweep(weight_CO: Tensor, U_CC: Tensor, drop_CO: Tensor, pattern: NM | None = None) -> tuple[Tensor, Tensor]:
    """The pruned weights and the errors (C, O), column by column; with a pattern, `drop_CO` is chosen on the way."""
    weight_CO, errors_CO = weight_CO.clone(), torch.zeros_like(weight_CO)
    for j in range(len(weight_CO)):
        if pattern and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            drop_CO[group] = ~pattern.mask(costs(weight_CO[group], U_CC[group, group])).t()
        errors_CO[j] = torch.where(drop_CO[j], weight_CO[j], 0) / U_CC[j, j]
        weight_CO[j + 1 :] -= torch.outer(U_CC[j, j + 1 :], errors_CO[j])
    return torch.where(drop_CO, 0, weight_CO), errors_CO


@pytest.mark.parametrize(("num_columns", "num_outputs"), MASKED)
def test_masked_is_the_sweep(kernel, num_columns, num_outputs):
    module, device = kernel
    weight, U = block(num_columns, num_outputs)
    drop = ~Unstructured(0.6).mask(costs(weight, U).contiguous(), per="matrix").t()  # a transposed view
    expected_weight, expected_errors = plain_sweep(weight, U, drop)
    pruned = weight.clone().to(device)
    errors = module.prune_block_masked(pruned, U.to(device), drop.to(device)).cpu()
    assert torch.equal(pruned.cpu() == 0, drop)
    torch.testing.assert_close(pruned.cpu(), expected_weight, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(errors, expected_errors, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("num_columns", "num_outputs", "n", "m"), N_OF_M)
def test_nm_is_the_sweep(kernel, num_columns, num_outputs, n, m):
    module, device = kernel
    weight, U = block(num_columns, num_outputs, by_column=True)
    expected_weight, expected_errors = plain_sweep(weight, U, torch.zeros_like(weight, dtype=torch.bool), NM(n, m))
    pruned = weight.clone().to(device)
    errors = module.prune_block_nm(pruned, U.to(device), n, m).cpu()
    torch.testing.assert_close(pruned.cpu(), expected_weight, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(errors, expected_errors, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8)])
def test_ties_keep_exactly_n_the_earlier_ones(kernel, n, m):
    module, device = kernel
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(1, 4, (32, 40), generator=generator) * (2.0 * torch.randint(0, 2, (32, 40), generator=generator) - 1)
    pruned = weight.clone().to(device)
    errors = module.prune_block_nm(pruned, torch.eye(32, device=device), n, m).cpu()
    order = weight.square().view(-1, m, 40).argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros(32 // m, m, 40, dtype=torch.bool).scatter_(1, order[:, :n], True).view_as(weight)
    assert torch.equal(pruned.cpu(), torch.where(kept, weight, 0))
    assert torch.equal(errors, torch.where(kept, 0, weight))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_so(kernel, bad):
    module, device = kernel
    weight, U = block(32, 9)
    weight[7, 4] = bad  # the last of its group: dropped, it would make NaN of all later groups, dropped like it
    pruned = weight.clone().to(device)
    module.prune_block_nm(pruned, U.to(device), 2, 4)
    assert pruned.isfinite().all(0).tolist() == [row != 4 for row in range(9)]


@needs_triton
@pytest.mark.parametrize(("n", "m"), [(0, 1), (2, 4)])
def test_compiles_for_a_gpu_that_is_not_here(n, m, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {**sweep_triton.sub_block(m), "N": n, "M": m, "BLOCK_O": sweep_triton.BLOCK_O, "U_row": 1}
    types = {"weight_CO": "*fp32", "errors_CO": "*fp32", "drop_CO": "*i1", "U_CC": "*fp32"}
    if n:
        constants["drop_CO"] = None
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in sweep_triton._sweep.arg_names}
    source = ASTSource(sweep_triton._sweep, signature, constants)
    options = {"num_warps": sweep_triton.NUM_WARPS, "enable_fp_fusion": True}
    compiled = sweep_triton.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    assert "fma.rn.f32" in compiled.asm["ptx"]
    assert "mma." not in compiled.asm["ptx"], "matrix units would round float32 to TF32"


def test_without_triton_the_module_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not load_again().available()
