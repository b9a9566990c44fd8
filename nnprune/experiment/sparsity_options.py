"""The option names of `sparsity`: any fraction of zeros and any N:M, without a file for each.

Hydra takes text as an option of a group, but no number, and numbers are what users type. So `sparsity` is a plain setting, whose
value Hydra replaces wherever it comes from: `sparsity=0.5`, a sweep, a line of an experiment file. What a defaults list names, such
as `override /sparsity: "2:4"`, is answered here: each option sets that one value.
"""

import os

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

GROUP = "sparsity"
EXAMPLES = ("0.5", "2:4", "4:8", "dense")


class SparsityOptions(ConfigSource):
    """Answers `sparsity/<anything>`; `parse_pattern` judges it later, with a better message."""

    @staticmethod
    def scheme() -> str:
        return GROUP

    def load_config(self, config_path: str) -> ConfigResult:
        value = config_path.removeprefix(f"{GROUP}/")
        return ConfigResult(self.provider, f"{self.scheme()}://", OmegaConf.create({GROUP: value}), {"package": "_global_"})

    def is_group(self, config_path: str) -> bool:
        """Only to a shell that completes `sparsity=`: a group could not be set to a number."""
        return config_path == GROUP and os.environ.get("COMP_LINE", "").rpartition(" ")[2].startswith(f"{GROUP}=")

    def is_config(self, config_path: str) -> bool:
        return config_path.startswith(f"{GROUP}/")

    def available(self) -> bool:
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return [] if results_filter == ObjectType.GROUP else list(EXAMPLES)


class SparsitySearchPath(SearchPathPlugin):
    """Makes Hydra look there after the folders of options."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("nnprune", f"{GROUP}://")


def register() -> None:
    """Make the options known to Hydra in this process."""
    for plugin in (SparsityOptions, SparsitySearchPath):
        Plugins.instance().register(plugin)
