"""Several processes of one run on this machine, as torchrun starts them but forked, so that nothing is imported again."""

import multiprocessing
import os
import socket
import sys
import time

import torch

from nnprune.engine import parallel


def _rank(index, num_ranks, port, function, arguments):
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", TORCHELASTIC_RUN_ID="test")
    torch.cuda.is_available = lambda: False  # a forked process cannot use the CUDA device of its parent
    parallel.start()
    try:
        function(*arguments)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def on_ranks(function, *arguments, num_ranks=2):
    """Call `function` in each of the processes, and return their exit statuses: 1 after an exception."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_rank, args=(index, num_ranks, port, function, arguments)) for index in range(num_ranks)]
    for process in processes:
        process.start()
    until = time.monotonic() + 60
    for process in processes:
        process.join(max(until - time.monotonic(), 0))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging
    return [process.exitcode for process in processes]
