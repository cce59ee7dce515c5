"""Exact attention: what every approximation is compared with."""
