"""A trained model in use: loading it from a run or from weights, and asking it."""
