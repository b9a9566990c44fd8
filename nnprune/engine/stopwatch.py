"""Seconds by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of each stage over repeated visits. A stage within another counts for the inner one alone.

    With a CUDA `device` it waits for the device at each change of stage, so that no stage pays for another's work.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._start = self._since = time.perf_counter()
        self._stages: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens within."""
        self._switch()
        self._stages.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stages.pop()

    def total(self) -> dict[str, float]:
        """All stages, and the time since this object was made."""
        return {**self.seconds, "total": time.perf_counter() - self._start}

    def _switch(self) -> None:
        """Book the time since the last change of stage on the stage it was spent in."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._stages:
            self.seconds[self._stages[-1]] = self.seconds.get(self._stages[-1], 0) + now - self._since
        self._since = now
