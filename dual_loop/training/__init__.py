"""The optimiser step, its guards, and what a run writes."""
