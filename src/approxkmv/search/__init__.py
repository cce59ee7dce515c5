"""Nearest keys by inner product: exact and graph indexes, the graph of the lecture, and what its guarantee rests on."""
