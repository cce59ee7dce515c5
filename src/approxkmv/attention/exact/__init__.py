"""Exact attention: the reference for every approximation."""
