"""Checkpoints: reading, checking and writing the official layout."""
