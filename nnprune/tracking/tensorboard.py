"""TensorBoard: event files in the run's folder."""

from collections.abc import Mapping
from pathlib import Path

from nnprune.tracking.base import TrackedRun, Tracker


class TensorBoard(Tracker):
    """Event files in `tensorboard/` of each run's folder: `tensorboard --logdir outputs` shows them all."""

    package = "tensorboard"
    remedy = "pip install tensorboard"

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.writer = run, SummaryWriter(str(run.folder / "tensorboard"))
        return "tensorboard"

    def log_layer(self, layer: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(f"layer/{key}", value, layer)
        self.writer.flush()

    def finish(self, metrics: Mapping[str, float], record: Path) -> None:
        settings = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self.run.settings.items()}
        self.writer.add_hparams(settings, dict(metrics), run_name=".")
        self.writer.add_text("record", f"```json\n{record.read_text(encoding='utf-8')}\n```")
        self.writer.close()

    def stop(self) -> None:
        self.writer.close()
