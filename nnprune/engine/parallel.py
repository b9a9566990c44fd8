"""The processes (ranks) of one run, if torchrun started several: what each of them does, and how they exchange results.

All ranks run the same program on their own rows and linears, and exchange tensors and objects here. Before each exchange they
meet, and an error of one rank is raised on all. Rank 0 alone reads and writes the files of a run. One process pays for nothing.
"""

import atexit
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUT = timedelta(days=7)
"""A rank may work alone for hours. One that has died is noticed at once."""


def start() -> None:
    """Join the other processes, if torchrun started this one and others. From then on rank 0 alone logs."""
    if is_distributed() or not dist.is_available() or not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    if rank() > 0:
        logging.disable()


def is_distributed() -> bool:
    """Whether this run has several processes."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def share(num_rows: int, whole: bool = False) -> slice:
    """The rows of this rank: consecutive ones, lower ranks first; if the rows are to stay `whole`, rank 0 has them all."""
    if whole:
        return slice(0, 0 if rank() else num_rows)
    start, stop = (-(-num_rows * index // world_size()) for index in (rank(), rank() + 1))
    return slice(start, stop)


def assign(costs: Sequence[float]) -> list[int]:
    """A rank for each task, given what tasks cost: the most expensive first, each to the rank that has least to do."""
    ranks, loads = [0] * len(costs), [0.0] * world_size()
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        ranks[task] = loads.index(min(loads))
        loads[ranks[task]] += costs[task]
    return ranks


def all_reduce(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over all ranks, in place, and return it."""
    if is_distributed():
        _meet()
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Replace a tensor by that of rank `source`, in place, and return it."""
    if is_distributed():
        _meet()
        dist.broadcast(tensor, source)
    return tensor


def concatenated(tensor: Tensor) -> Tensor:
    """The tensors (rows, ...) of all ranks, which may differ in rows, one below the other."""
    if not is_distributed():
        return tensor
    sizes = gather(len(tensor))
    whole = tensor.new_zeros(sum(sizes), *tensor.shape[1:])
    whole.split(sizes)[rank()].copy_(tensor)
    return all_reduce(whole)


def gather(value: T) -> list[T]:
    """The values of all ranks, which must be picklable."""
    if not is_distributed():
        return [value]
    _meet()
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(function: Callable[P, T]) -> Callable[P, T]:
    """A function that rank 0 alone calls while the others wait: all return its result, or raise its error."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with together():
            result = None if rank() else function(*args, **kwargs)
        return gather(result)[0]

    return call


@contextmanager
def together() -> Iterator[None]:
    """Ranks leave the block together: an error of one ends the block of the others at their next exchange or at its end."""
    try:
        yield
    except Exception as error:
        if is_distributed() and not hasattr(error, "is_shared"):
            _meet(error)
        raise
    if is_distributed():
        _meet()


def wait() -> None:
    """Wait for the other ranks, unless they have died."""
    with suppress(ConnectionError):
        if is_distributed():
            _meet()


def _meet(error: Exception | None = None) -> None:
    """Wait for all ranks. If any come with an error, raise that of the lowest such rank on all.

    Others than that rank raise it as ValueError, OSError or RuntimeError. Raises ConnectionError if a rank has died.
    """
    try:
        num_failed = torch.tensor(int(error is not None))
        dist.all_reduce(num_failed)
        if not num_failed:
            return
        told: list[Any] = [None] * world_size()
        dist.all_gather_object(told, error and _described(error))
    except RuntimeError as lost:
        shared: Any = ConnectionError("another process of this run has died; run the same command again to resume")
        shared.is_shared = True
        raise shared from lost
    failed = next(index for index, one in enumerate(told) if one)
    if failed == rank():
        shared = error
    else:
        kind, message, trace = told[failed]
        shared = kind(f"rank {failed}: {message}")
        shared.add_note(trace)
    shared.is_shared = True
    raise shared


def _described(error: Exception) -> tuple[type[Exception], str, str]:
    """The kind of an error that callers distinguish, its message and its traceback."""
    trace = "".join(traceback.format_exception(error))
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind, str(error), trace
    return RuntimeError, f"{type(error).__name__}: {error}", trace
