"""Methods that keep few keys for all queries, with weights."""
