"""Readers of the four data sets, mask tools, the on-disk index, and the union that training draws from."""
