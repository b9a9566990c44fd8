"""An experiment's tracker at work: `tracking=`."""

from pathlib import Path

from nnprune.engine import parallel
from nnprune.experiment.build import Experiment
from nnprune.tracking.base import TrackedRun, Tracker
from nnprune.tracking.session import TrackingSession, flattened


def tracked(experiment: Experiment) -> TrackingSession:
    """A session that shows the run of an experiment, in the first process only. Enter it with the run's folder locked."""
    folder, config = experiment.folder, experiment.config
    name = f"{experiment.source.name} {experiment.label} {experiment.pattern}"
    settings = flattened({key: value for key, value in config.items() if key != "tracking"})
    run = TrackedRun(folder.relative_to(Path(config["outputs"])).as_posix(), name, folder, settings)
    return TrackingSession(Tracker() if parallel.rank() else experiment.tracker, run)
