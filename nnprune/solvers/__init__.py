"""Numerical methods shared by pruners and updates: factorisations, least squares, projections onto patterns, layer errors."""
