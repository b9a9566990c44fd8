"""Weights & Biases, online or offline."""

from collections.abc import Mapping
from pathlib import Path

from nnprune.tracking.base import TrackedRun, Tracker


class WandB(Tracker):
    """One wandb run for each run.

    Args:
        project: its project.
        entity: user or team; null: the account's default.
        mode: online, or offline for `wandb sync` later.
    """

    package = "wandb"
    remedy = "pip install wandb"

    def __init__(self, project: str = "nnprune", entity: str | None = None, mode: str = "online") -> None:
        self.project, self.entity, self.mode = project, entity, mode

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            id=run_id,
            resume="allow",
            name=run.name,
            config=dict(run.settings),
            dir=str(run.folder),
            mode=self.mode,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run.define_metric("layer/*", step_metric="layer/index")
        return self.run.id

    def log_layer(self, layer: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"layer/index": layer, **{f"layer/{key}": value for key, value in metrics.items()}})

    def finish(self, metrics: Mapping[str, float], record: Path) -> None:
        self.run.summary.update(dict(metrics))
        artifact = self.wandb.Artifact(f"record-{self.run.id}", type="record")
        artifact.add_file(str(record))
        self.run.log_artifact(artifact)
        self.run.finish()

    def stop(self) -> None:
        self.run.finish(exit_code=1)
