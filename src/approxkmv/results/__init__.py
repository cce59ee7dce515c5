"""The files between the steps: tables, shards, activations."""
