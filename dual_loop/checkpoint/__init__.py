"""Checkpoints: reading and writing released weights, and the checkpoints of a run."""
