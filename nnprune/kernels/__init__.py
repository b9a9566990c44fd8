"""Kernels in C and Triton, each with the PyTorch operations that it replaces, and how they are compiled."""
