"""Figures, one file each: they read tables and write PDF and PNG, and need neither a model nor a GPU."""
