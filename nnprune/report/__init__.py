"""Tables and plots from records. Imports nothing else of nnprune."""
