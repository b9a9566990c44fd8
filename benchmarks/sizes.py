"""Memory and disk of a run, in GiB, as `plan=true` counts them, without timing any layers: python -m benchmarks.sizes SETTING ..."""

import sys

from hydra import compose, initialize_config_dir

from nnprune.experiment.build import build
from nnprune.experiment.cost_estimate import GIB, CostEstimate
from nnprune.run import CONF

SHARED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Linears of a layer that share an input, in OPT, Llama and Qwen3."""


class Sizes(CostEstimate):
    """A cost estimate without seconds."""

    def _count_seconds(self) -> dict[str, float]:
        groups: dict[int, list[str]] = {}
        for name in self.decoder.shapes_by_layer()[0]:
            last = name.split(".")[-1]
            key = next((place for place, names in enumerate(SHARED) if last in names), len(groups) + len(SHARED))
            groups.setdefault(key, []).append(name)
        self.load.groups = list(groups.values())
        return {}


def main() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        sizes = Sizes([build(compose("config", sys.argv[1:]))])
    print(f"host {sizes.host_bytes / GIB:.2f} GiB, disk {sizes.disk_bytes / GIB:.2f} GiB")


if __name__ == "__main__":
    main()
