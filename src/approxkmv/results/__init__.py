"""The files passed between steps: tables, shards, activations."""
