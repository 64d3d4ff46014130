"""Measures a model on held-out data: referring segmentation, captioning, and the loop of both."""
