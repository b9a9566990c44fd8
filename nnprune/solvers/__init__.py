"""What methods compute with: factorisations, least squares, projections onto patterns, layer errors."""
