"""Tiles of products, Triton kernels and CUDA graphs shared by several methods."""
