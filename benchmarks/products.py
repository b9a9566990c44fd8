"""How much of a stage lies within matrix products: torch.profiler on the CPU, read without its slow summaries."""

import time

from torch.profiler import ProfilerActivity, profile

PRODUCTS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::addmm_",
        "aten::bmm",
        "aten::baddbmm",
        "aten::baddbmm_",
        "aten::matmul",
        "aten::linear",
        "aten::mkldnn_linear",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_attention_math",
        "aten::scaled_dot_product_attention",
        "mkldnn::_linear_pointwise",
        "nnprune::add_product",
        "nnprune::causal_attention",
    }
)
FACTORISATIONS = frozenset({"aten::linalg_cholesky", "aten::linalg_cholesky_ex", "aten::cholesky_inverse"})


class ProductProfile:
    """Context manager around a stage; `shares()` afterwards.

    An operator that calls another of its own kind, as aten::linear calls aten::addmm, counts once: the outermost one.
    """

    def __enter__(self) -> "ProductProfile":
        self._profile = profile(activities=[ProfilerActivity.CPU])
        self._profile.__enter__()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._profile.__exit__(*error)

    def shares(self) -> dict[str, float]:
        """Fractions of the stage's wall time by kind of operator, and the seconds that the profiled stage took."""
        # A column-by-column solver makes millions of events: the public summaries would take minutes and gigabytes.
        events = self._profile.profiler.kineto_results.events()
        spans = {"products": PRODUCTS, "factorisations": FACTORISATIONS}
        found: dict[str, list[tuple[int, int]]] = {kind: [] for kind in spans}
        for event in events:
            name = event.name()
            for kind, names in spans.items():
                if name in names:
                    found[kind].append((event.start_ns(), event.start_ns() + event.duration_ns()))
        shares = {kind: _covered(intervals) / 1e9 / self.seconds for kind, intervals in found.items()}
        return {**shares, "seconds": self.seconds}


def _covered(intervals: list[tuple[int, int]]) -> int:
    """Length of the union of intervals."""
    total, end = 0, 0
    for start, stop in sorted(intervals):
        total += max(stop - max(start, end), 0)
        end = max(end, stop)
    return total
