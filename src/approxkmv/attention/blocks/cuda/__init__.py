"""The block methods on CUDA."""
