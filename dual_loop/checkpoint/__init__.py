"""Checkpoints: reading and writing released weights, and the checkpoints of a run."""

FORMATS = ("original", "original-trimmed", "hf-native", "hf-sa2va", "adapter")
"""What ``dual-loop export --format`` writes; see :mod:`dual_loop.checkpoint.exporter`."""
