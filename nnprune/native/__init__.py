"""Kernels in C for what PyTorch does slowly on a CPU: compiled where they run, once, and left out where that can't be."""
