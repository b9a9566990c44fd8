"""Which GPU a process computes on: one that no other nnprune process of this user on this machine uses, if there is one.

A process locks a file named by the UUID of its GPU and keeps it locked until it ends. So it does not matter which GPUs
CUDA_VISIBLE_DEVICES shows to which process.
"""

import fcntl
import logging
import os
from contextlib import suppress
from functools import cache
from itertools import count

import torch

from nnprune.files.digests import cache_folder

log = logging.getLogger(__name__)


@cache
def own_gpu() -> int:
    """Index of this process's GPU among the several that it sees.

    If all are in use: of those that the fewest processes use, the one with most free memory.
    """
    names = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    try:
        for others in count():
            order = range(len(names))
            for index in sorted(order, key=_free_bytes, reverse=True) if others else order:
                if _lock(f"{names[index]}.{others}"):
                    if others:
                        log.warning("warning: all %d GPUs are in use by other runs; sharing cuda:%d", len(names), index)
                    return index
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        log.warning("warning: GPUs cannot be locked (%s): using the first; set runtime.device=cuda:N for each run", error)
    return 0


def _lock(name: str) -> bool:
    """Lock a file until this process ends. Returns False if another process has locked it; raises OSError where it cannot be."""
    folder = cache_folder() / "gpus"
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        os.close(file)
        return False


def _free_bytes(index: int) -> int:
    with suppress(RuntimeError):  # too full even to be asked
        return torch.cuda.mem_get_info(index)[0]
    return 0
