"""Methods that find or sample keys by hashing."""
