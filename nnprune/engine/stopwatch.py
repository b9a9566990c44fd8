"""Measures the seconds that each stage of a run takes."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from nnprune.runtime import peaks


class Stopwatch:
    """Adds up the time of each stage over repeated visits. Time in a nested stage counts for the inner one only.

    With a CUDA `device` it synchronises at each change of stage, so that no stage is charged for another's work.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._start = self._since = time.perf_counter()
        self._stages: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as part of stage `name`."""
        self._switch()
        self._stages.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stages.pop()

    def total(self) -> dict[str, float]:
        """Seconds by stage, and under "total" the seconds since this object was created, with those of `resume`."""
        self._switch()
        return {**self.seconds, "total": self._since - self._start}

    def so_far(self) -> dict[str, dict[str, Any]]:
        """What a layer's report says of the whole run: the `total()` and the peaks of memory up to now."""
        return {"run_seconds": self.total(), "run_peaks": peaks()}

    def resume(self, earlier: Mapping[str, float]) -> None:
        """Add the `total()` of an earlier process whose work this one continues, evaluations excepted: they begin anew."""
        for stage, seconds in earlier.items():
            if stage == "total":
                self._start -= seconds
            elif stage.endswith("evaluation"):
                self._start += seconds
            else:
                self.seconds[stage] = self.seconds.get(stage, 0) + seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The time of the block counts for nothing, not for the total either: another run is waited for."""
        self._switch()
        try:
            yield
        finally:
            now = time.perf_counter()
            self._start += now - self._since
            self._since = now

    def _switch(self) -> None:
        """Add the time since the last change of stage to the stage that ends or is suspended now."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._stages:
            self.seconds[self._stages[-1]] = self.seconds.get(self._stages[-1], 0) + now - self._since
        self._since = now
