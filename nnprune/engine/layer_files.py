"""Layer files: per-layer checkpoints that a resumed run starts from.

A finished layer is a safetensors file, with the full names of its weights, and a JSON file with its report and the checksum of
the weights. The report is written last: its presence means "finished". A thread writes them behind the computation.

Layers that are pruned but not final are carried: a file beside the last finished layer has them as they were when it was finished.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from nnprune.engine import parallel
from nnprune.engine.stopwatch import Stopwatch
from nnprune.model.checkpoint import save_atomically
from nnprune.records import read_journal, write_journal

log = logging.getLogger(__name__)

GetState = Callable[[], dict[str, Tensor]]
"""Returns name within the layer -> tensor, in host memory, of a decoder layer that no longer changes. Called in any thread."""

Carried = tuple[dict[int, dict[str, Any]], GetState]
"""Layers that are not final: the report of each so far, and full name -> tensor."""

TASKS_BEHIND = 2
"""Tasks that a `Background` may be behind: each may hold a decoder layer in memory."""


@contextmanager
def writing(all_files: "Sequence[LayerFiles]", stopwatch: Stopwatch) -> Iterator[None]:
    """Layer files are complete when the block ends."""
    try:
        yield
    except BaseException:
        for files in all_files:
            files.settle()
        raise
    with stopwatch.stage("write"):
        for files in all_files:
            files.finish()


class Background:
    """A thread that does tasks in order, at most `TASKS_BEHIND` behind. The process does not end before they are done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "layer-files")
        self._behind: deque[Future] = deque()

    def submit(self, task: Callable[[], Any]) -> Future:
        """Have `task()` called, after waiting while too many are left. Raises what an earlier task raised."""
        self.wait(TASKS_BEHIND - 1)
        self._behind.append(self._thread.submit(task))
        return self._behind[-1]

    def wait(self, left: int = 0) -> None:
        """Wait until at most so many tasks are `left`. Raises what a task raised, once."""
        while self._behind and (len(self._behind) > left or self._behind[0].done()):
            self._behind.popleft().result()


class LayerFiles:
    """The finished decoder layers of one run. A damaged file is ignored, and so are those of all later layers.

    Args:
        folder: holds the files.
        prefix: full name of the list of decoder layers, such as "model.layers".
        interval: seconds of work that a kill may lose: finished layers stay in memory as long. 0: each is written at once.
        thread: writes the files; None: one of its own.
        clock: tells the seconds.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        interval: float = 0,
        thread: Background | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.prefix = prefix
        self._interval = interval
        self._files, self._copies = thread or Background(), Background()
        self._clock, self._since = clock, clock()
        self._in_memory: dict[int, GetState] = {}
        self._unwritten: set[int] = set()  # handed to the thread, and not known to be on disk
        self._last_carried: Carried | None = None
        self.reports, self.carried = self._read_reports()

    @parallel.on_rank_0
    def _read_reports(self) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
        """The reports of the finished layers, and of those carried beside the last."""
        reports: dict[int, dict[str, Any]] = {}
        carried: list[dict[str, Any]] = []
        while (found := read_journal(self._report_path(len(reports)))) is not None:
            index = len(reports)
            weights = self.path(index)
            if not weights.is_file() or found.get("index") != index or found.get("weights_sha256") != _checksum(weights):
                log.warning("warning: %s is missing or damaged: this layer and later ones are pruned again", weights)
                break
            reports[index] = found["report"]
            carried.append(found.get("carried", {"reports": {}}))
        num_finished, is_damaged = len(reports), False
        while carried and not self._has_carried(len(carried) - 1, carried[-1]):
            is_damaged |= carried.pop() is not None
            reports.pop(len(carried))
        if is_damaged:
            path = self._carried_path(num_finished - 1)
            log.warning("warning: %s is missing or damaged: layer %d and later ones are pruned again", path, len(reports))
        return reports, {int(index): report for index, report in carried[-1]["reports"].items()} if carried else {}

    def _has_carried(self, index: int, carried: dict[str, Any] | None) -> bool:
        """Whether a run can go on behind finished layer `index`, whose file says what was carried: None if that was not written."""
        if carried is None or not carried["reports"]:
            return carried is not None
        path = self._carried_path(index)
        return path.is_file() and _checksum(path) == carried["sha256"]

    def __contains__(self, index: int) -> bool:
        return index in self.reports

    @property
    def num_cells(self) -> int:
        """How many cells of a grid the layers were pruned for in one pass, 1 without a grid."""
        return max((report["num_cells"] for report in self.reports.values()), default=1)

    def path(self, index: int) -> Path:
        """The safetensors file of decoder layer `index`, complete after `finish` unless the layer is in memory."""
        return self.folder / f"layer-{index:04d}.safetensors"

    def read(self, index: int) -> dict[str, Tensor]:
        """Name within the layer -> tensor, of a finished decoder layer. Not to be changed in place."""
        if index in self._in_memory:
            return self._in_memory[index]()
        if index in self._unwritten:
            self.finish()
        return self._read_from(self.path(index), index)

    def read_carried(self, index: int) -> dict[str, Tensor]:
        """Name within the layer -> tensor, of a decoder layer that an earlier process carried."""
        return self._read_from(self._carried_path(len(self.reports) - 1), index)

    def _read_from(self, path: Path, index: int) -> dict[str, Tensor]:
        prefix = f"{self.prefix}.{index}."
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}

    def write(self, index: int, state: GetState, report: dict[str, Any], carried: Carried | None = None) -> None:
        """Take decoder layer `index` as finished, to be written when `interval` says, with the layers carried at this time.

        Waits when the thread is far behind. Raises OSError, naming the folder, if an earlier layer could not be written.
        """
        if self._interval:
            state = self._copies.submit(state).result
        self.reports[index] = report
        self._in_memory[index] = state
        self._last_carried = carried
        if self._write_if_due():
            self._unwritten.update(self._in_memory)
            self._in_memory = {}

    def finish(self) -> None:
        """Wait for what is being written. Raises OSError, naming the folder, if a layer could not be written."""
        self._copies.wait()
        parallel.on_rank_0(self._files.wait)()
        self._unwritten.clear()

    def settle(self) -> None:
        """Wait for what is being written after an error, which is raised instead of those of the thread: they are logged."""
        try:
            self._files.wait()
        except Exception as error:
            log.warning("warning: %s", getattr(error, "strerror", None) or error)

    @parallel.on_rank_0
    def _write_if_due(self) -> bool:
        """Have the layers in memory written, if it is time. Returns whether it is."""
        self._files.wait(TASKS_BEHIND)  # for errors
        now = self._clock()
        if now - self._since < self._interval:
            return False
        self._since = now
        self._files.submit(partial(self._save, dict(self._in_memory), self._last_carried))
        return True

    def _save(self, states: dict[int, GetState], carried: Carried | None) -> None:
        last = max(states)
        for index in sorted(states):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                named = {f"{self.prefix}.{index}.{name}": tensor for name, tensor in states.pop(index)().items()}
                save_atomically(named, self.path(index))
                digest = _checksum(self.path(index))
                content = {"index": index, "report": self.reports[index], "weights_sha256": digest}
                if carried is not None:
                    content["carried"] = self._save_carried(index, *carried) if index == last else None
                write_journal(self._report_path(index), content)
                if carried is not None and index == last:
                    for path in set(self.folder.glob("carried-*")) - {self._carried_path(last)}:
                        path.unlink()
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"outputs: decoder layer {index} could not be saved in {self.folder} ({error.strerror or error}); "
                    "make room or set outputs to another disk, then run again: finished layers are kept",
                ) from error

    def _save_carried(self, index: int, reports: dict[int, dict[str, Any]], state: GetState) -> dict[str, Any]:
        if not reports:
            return {"reports": {}}
        path = self._carried_path(index)
        save_atomically(state(), path)
        return {"reports": {str(key): report for key, report in reports.items()}, "sha256": _checksum(path)}

    def _carried_path(self, index: int) -> Path:
        return self.folder / f"carried-{index:04d}.safetensors"

    def _report_path(self, index: int) -> Path:
        return self.folder / f"layer-{index:04d}.json"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
