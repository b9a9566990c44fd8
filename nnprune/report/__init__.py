"""Records to tables and plots. Imports nothing of nnprune but records."""
