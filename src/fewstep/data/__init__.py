"""Data sets and the episodes drawn from them."""
