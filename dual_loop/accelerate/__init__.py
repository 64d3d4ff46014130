"""Levers that compute the same faster."""
