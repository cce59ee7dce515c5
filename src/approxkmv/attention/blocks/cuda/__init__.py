"""The methods of blocks on CUDA."""
