"""Tiles of products, Triton kernels and CUDA graphs that several methods share."""
