"""Files of models and texts: on this machine, and brought from the hub."""
