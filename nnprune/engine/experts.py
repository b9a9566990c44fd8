"""Mixtures of experts in the calibration: which weights share an input, and what is done for experts that few tokens reach.

Letters: I input features.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nnprune.calibration import MIN_TOKENS_PER_EXPERT
from nnprune.model.weight_views import Expert, ExpertView, WeightView
from nnprune.statistics import CrossProduct, Hessian, InputStatistic

Statistics = dict[type[InputStatistic], InputStatistic]


@dataclass(frozen=True)
class Routing:
    """Which tokens an expert is calibrated with.

    Args:
        min_tokens: an expert with fewer gets, for each one that it lacks, the mean of the tokens of all experts of its layer.
        shows_all: every expert sees every token, not just those that are routed to it.
    """

    min_tokens: int = MIN_TOKENS_PER_EXPERT
    shows_all: bool = False

    @contextmanager
    def applied(self, weights: Mapping[str, WeightView]) -> Iterator[None]:
        """Show the experts among the weights of a layer the tokens that they are to see, in forwards inside. Raises ValueError where
        that cannot be done."""
        mixtures = {weight.experts for weight in weights.values() if isinstance(weight, ExpertView)} if self.shows_all else ()
        for name, weight in weights.items() if self.shows_all else ():
            if weight.expert and not (isinstance(weight, ExpertView) and weight.experts.is_told_routes):
                reason = f"{name} is of an expert whose module chooses its tokens itself"
                raise ValueError(f"calibration.route=all: {reason}; set calibration.route=own")
        for experts in mixtures:
            experts.shows_all_tokens = True
        try:
            yield
        finally:
            for experts in mixtures:
                experts.shows_all_tokens = False


def with_all_experts(groups: Sequence[list[str]], weights: Mapping[str, WeightView]) -> list[list[str]]:
    """The `groups` of weights that share an input, seen for a few tokens, with those of the experts that none was routed to: the same
    parts share an input in all experts of a mixture, which come in order where its first one was seen."""
    experts = {name: weight.expert for name, weight in weights.items() if weight.expert}
    parts: dict[tuple[str, int], list[list[str]]] = {}  # of an expert: names of its parts that share an input
    for names in groups:
        if owner := _owner(names, experts):
            parts.setdefault(owner, []).append([experts[name].part for name in names])
    found: list[list[str]] = []
    done: set[str] = set()
    for names in groups:
        if (owner := _owner(names, experts)) is None:
            found.append(names)
        elif owner[0] not in done:
            done.add(owner[0])
            groups_of_all = _groups_of(owner[0], parts, experts.values())
            found += filter(None, ([name for name in shared if name in experts] for shared in groups_of_all))
    return found


def _owner(names: Collection[str], experts: Mapping[str, Expert]) -> tuple[str, int] | None:
    """The mixture and the index of the expert that weights with a common input belong to; None if not all are of one."""
    owners = {experts[name][:2] if name in experts else None for name in names}
    return owners.pop() if len(owners) == 1 else None


def _groups_of(
    mixture: str, parts: Mapping[tuple[str, int], list[list[str]]], experts: Iterable[Expert]
) -> Iterator[list[str]]:
    """Those of the same part together, which depend on none of each other."""
    numbers = sorted({one.number for one in experts if one.mixture == mixture})
    seen = max((found for (owner, _), found in parts.items() if owner == mixture), key=lambda found: sum(map(len, found)))
    for shared in seen:
        yield from ([Expert(mixture, number, part).name for part in shared] for number in numbers)


def share_tokens(
    statistics: Mapping[str, Statistics], experts: Mapping[str, Expert], pools: Mapping[tuple, Statistics], routing: Routing
) -> dict[str, dict[str, int]]:
    """Fill up the statistics of experts that few tokens reached. Returns for each expert's linears what was done, for the record.

    Args:
        statistics: first linear of a group -> its statistics.
        experts: those of the groups that are of an expert.
        pools: sums over experts beside these, by `pool_key`.
    """
    done: dict[str, dict[str, int]] = {}
    for name in experts:
        for statistic in statistics[name].values():
            lacking = max(routing.min_tokens - statistic.num_tokens, 0)
            done[name] = {"tokens": statistic.num_tokens, **({"pooled_tokens": lacking} if lacking else {})}
    for key in {pool_key(experts[name]) for name, entry in done.items() if "pooled_tokens" in entry}:
        members = [name for name, expert in experts.items() if pool_key(expert) == key]
        for kind in statistics[members[0]]:
            pool = kind()
            for one in (*(statistics[name] for name in members), *filter(None, [pools.get(key)])):
                pool.merge(one[kind])
            for name in members:
                statistics[name][kind].fill_up(pool, done[name].get("pooled_tokens", 0))
    return done


def few_tokens(reports: Iterable[Mapping[str, Any]]) -> str:
    """What the log says of a layer, with the `reports` of its linears, whose experts lacked tokens; nothing if none did."""
    reached = {report["name"]: "pooled_tokens" in report for report in reports if "tokens" in report}
    return f"  {sum(reached.values())} of {len(reached)} linears of experts with few tokens" if any(reached.values()) else ""


def pool_key(expert: Expert) -> tuple[str, str]:
    """What experts have in common that receive an input of the same kind."""
    return expert.mixture, expert.part


def bytes_of_statistics(kinds: Iterable[type[InputStatistic]], num_inputs: int) -> int:
    """What statistics of `kinds` take for `num_inputs` input features. Those of less than a matrix are not worth counting."""
    return sum(4 * num_inputs**2 for kind in kinds if kind in (Hessian, CrossProduct))
