"""MLflow: a server, or a database in a file."""

import re
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from nnprune.tracking.base import TrackedRun, Tracker

MAX_PARAMETERS = 100
"""That MLflow takes in one request."""

MAX_KEY = 250
"""Characters of the name of a parameter or a metric."""

MAX_LENGTH = 500
"""Of a parameter's value, in all versions of MLflow."""


class MLflow(Tracker):
    """One MLflow run for each run.

    Args:
        uri: of the tracking server or database, such as sqlite:///outputs/mlflow.db.
        experiment: the name of the MLflow experiment.
        artifacts: folder for the records; null: the server's own.
    """

    package = "mlflow"
    remedy = "pip install 'nnprune[track]'"

    def __init__(self, uri: str, experiment: str = "nnprune", artifacts: str | None = None) -> None:
        self.uri, self.experiment, self.artifacts = uri, experiment, artifacts

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._metric = Metric
        folder = Path(self.uri.removeprefix("sqlite:///")).parent if self.uri.startswith("sqlite:///") else run.folder
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".mlflow.lock"):  # two processes cannot create one database at once
            self.client = MlflowClient(self.uri)
            found = self.client.get_experiment_by_name(self.experiment)
            experiment_id = found.experiment_id if found else self._create_experiment()
        if run_id:
            try:
                self.client.update_run(run_id, status="RUNNING")
                self.run_id = run_id
                return run_id
            except MlflowException:  # it was deleted, or the server is another one
                pass
        tags = {"mlflow.runName": run.name, "nnprune.folder": str(run.folder)}
        self.run_id = self.client.create_run(experiment_id, tags=tags).info.run_id
        settings = {_key(key): str(value)[:MAX_LENGTH] for key, value in run.settings.items()}
        parameters = [Param(key, value) for key, value in settings.items()]
        for start in range(0, len(parameters), MAX_PARAMETERS):
            self.client.log_batch(self.run_id, params=parameters[start : start + MAX_PARAMETERS])
        return self.run_id

    def log_layer(self, layer: int, metrics: Mapping[str, float]) -> None:
        self._log({f"layer_{key}": value for key, value in metrics.items()}, layer)

    def finish(self, metrics: Mapping[str, float], record: Path) -> None:
        self._log(metrics, 0)
        self.client.log_artifact(self.run_id, str(record))
        self.client.set_terminated(self.run_id, "FINISHED")

    def stop(self) -> None:
        self.client.set_terminated(self.run_id, "FAILED")

    def _create_experiment(self) -> str:
        location = Path(self.artifacts).absolute().as_uri() if self.artifacts else None
        return self.client.create_experiment(self.experiment, artifact_location=location)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self.client.log_batch(
            self.run_id, metrics=[self._metric(_key(key), value, now, step) for key, value in metrics.items()]
        )


def _key(name: str) -> str:
    """A name as MLflow takes it: *.mlp.* of allocation.patterns is _.mlp._, and no part between slashes is empty or dots."""
    return "/".join(part if part.strip(".") else "_" for part in re.sub(r"[^\w\-. :/]", "_", name).split("/"))[:MAX_KEY]
