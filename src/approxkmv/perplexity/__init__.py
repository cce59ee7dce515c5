"""Perplexity of a causal language model whose attention is replaced by a method."""
