"""Pairs chosen in advance by their positions, whatever the queries and keys."""
