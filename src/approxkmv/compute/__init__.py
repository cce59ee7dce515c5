"""Threads, scratch memory and counting, shared by statistics and attention."""
