"""Attention methods and plans inside other libraries."""
