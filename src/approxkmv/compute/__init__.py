"""Threads, scratch memory and counting: what statistics and attention share."""
