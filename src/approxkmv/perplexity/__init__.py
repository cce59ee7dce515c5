"""Perplexity of a causal language model with an attention method in place of its own attention."""
