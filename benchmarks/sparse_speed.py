"""What 2:4 sparsity brings on this machine's GPU: PyTorch's semi-structured kernels against dense products.

    python benchmarks/sparse_speed.py outputs/demo/2of4/wanda-*/model
    python benchmarks/sparse_speed.py DIR --tokens 1,16,256,4096 --dtype bfloat16

Every shape of the model's linears is timed once, with its own weights, for each number of tokens in a batch. A ratio below 1 means that
the sparse product is slower. Needs CUDA, compute capability 8.0 or above. A product's error is relative to the dense one's norm.
"""

import argparse
import sys

import torch
from torch import Tensor
from torch.sparse import to_sparse_semi_structured
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM

SMALLEST = 8  # rows of inputs that the sparse kernels take; PyTorch pads fewer


def microseconds(x: Tensor, weight: Tensor) -> float:
    """Median time of x (T, I) times weight (O, I) transposed."""
    timer = Timer("linear(x, weight)", globals={"linear": torch.nn.functional.linear, "x": x, "weight": weight})
    return timer.blocked_autorange(min_run_time=0.2).median * 1e6


def weights_by_shape(folder: str) -> dict[tuple[int, int], tuple[str, Tensor]]:
    """(O, I) -> name and weight of the first linear of that shape with 2:4 zeros."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found: dict[tuple[int, int], tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or module.in_features % 4:
            continue
        weight = module.weight.detach()
        if weight.unflatten(1, (-1, 4)).count_nonzero(dim=-1).max() <= 2:
            found.setdefault(tuple(weight.shape), (name, weight))
    return found


@torch.inference_mode()
def main() -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="a 2:4 model that save=true wrote")
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096", help="tokens in a batch")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: there is nothing to measure, PyTorch has no kernels for 2:4 weights on other hardware")
        return 0
    if torch.cuda.get_device_capability() < (8, 0):
        print(
            f"{torch.cuda.get_device_name()} has no units for 2:4 weights (compute capability 8.0 or above): nothing to measure"
        )
        return 0
    shapes = weights_by_shape(args.folder)
    if not shapes:
        sys.exit(f"Error: {args.folder} has no linear with at most 2 nonzeros in every 4; make one with sparsity=2:4 save=true")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {args.dtype}, microseconds a product")
    print("| linear | shape | tokens | dense | 2:4 | dense / 2:4 | error |\n| :--- | :--- | ---: | ---: | ---: | ---: | ---: |")
    for (rows, columns), (name, weight) in shapes.items():
        dense = weight.to("cuda", getattr(torch, args.dtype))
        try:
            sparse = to_sparse_semi_structured(dense)
        except (RuntimeError, ValueError) as error:  # a shape that the kernels do not take
            print(f"| {name} | {rows} x {columns} | | | | not supported: {' '.join(str(error).split())[:80]} | |")
            continue
        for tokens in map(int, args.tokens.split(",")):
            x = torch.randn(max(tokens, SMALLEST), columns, device="cuda", dtype=dense.dtype)[:tokens]
            y = torch.nn.functional.linear(x, dense)
            error = (torch.nn.functional.linear(x, sparse) - y).norm() / y.norm()
            times = microseconds(x, dense), microseconds(x, sparse)
            figures = f"{times[0]:.1f} | {times[1]:.1f} | {times[0] / times[1]:.2f} | {error:.0e}"
            print(f"| {name} | {rows} x {columns} | {tokens} | {figures} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
