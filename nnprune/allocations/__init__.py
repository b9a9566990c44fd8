"""Allocations: which sparsity pattern each linear gets. One file per method; base.py has the rules for all plans."""
