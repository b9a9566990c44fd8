"""A config becomes checked objects becomes a run."""
