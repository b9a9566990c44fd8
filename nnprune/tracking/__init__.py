"""Experiment trackers: where the settings, layers and metrics of a run are shown while it works."""
