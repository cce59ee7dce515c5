"""Nearest keys by inner product: exact and graph indexes, the graph of the lecture, and the basis of its guarantee."""
