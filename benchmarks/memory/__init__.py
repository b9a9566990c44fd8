"""Tools that show that a model larger than memory can be pruned: random checkpoints, memory limits, checks of what was saved."""
