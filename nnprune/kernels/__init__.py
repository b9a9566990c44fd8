"""C and Triton kernels, and how they are compiled. Their callers have a PyTorch fallback."""
