"""Calibrations beside plain text: token ids from files, conversations, text that the model writes itself. One file each."""
