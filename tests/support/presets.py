"""The options of conf/: pruners and the patterns that they support, allocations that look at the dense model."""

from conftest import compose_config
from hydra.utils import instantiate

from nnprune.patterns import parse_pattern
from nnprune.pruners.base import Pruner
from nnprune.run import CONF

NAMES = sorted(path.stem for path in (CONF / "pruner").glob("*.yaml") if path.stem != "custom")
UNMEASURED = ("uniform", "file", "by_name")
MEASURED = sorted(path.stem for path in (CONF / "allocation").glob("*.yaml") if path.stem not in UNMEASURED)


def make_pruner(name: str) -> Pruner:
    return instantiate(compose_config(f"pruner={name}").pruner, _convert_="all")


def supported(name: str, spec: str) -> bool:
    try:
        make_pruner(name).validate(parse_pattern(spec))
    except ValueError:
        return False
    return True
