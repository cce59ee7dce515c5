"""Figures, one file each: they read tables and write PDF and PNG; no model or GPU is needed."""
