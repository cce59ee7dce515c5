"""Methods that find keys by search."""
