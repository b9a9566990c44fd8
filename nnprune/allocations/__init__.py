"""Allocations: which sparsity pattern each linear gets. One file a method; the rules that all obey are in base.py."""
